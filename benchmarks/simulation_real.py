"""The real trainer's part of benchmarks/simulation.py: SmolLM2 and its data in simulated devices, in one process.

    python -m benchmarks.simulation_real '{"clients": 4, "rounds": 2, "steps": 8, …}'

prints one JSON object. Overhead is what a simulation takes beside the training itself: of the seconds from the fleet's
file to its tables, those that are neither inside `loop.train_round` or `evaluating.evaluate` (forward, backward,
optimiser) nor go to the reading of the base, which a training without a simulator reads as well. So the reading and
tokenising of examples, encoding and decoding, messages, merges, the store, the event log and the tables are all
overhead.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.resident import peak_bytes
from simulation import settings, tables
from simulation.world import World


@dataclass(frozen=True)
class Run:
    """One simulation with real training.

    Attributes:
        data: JSONL files of examples, of which every client has as many.
        clients: devices, all of which take part in every round.
        rounds: of the fleet.
        steps: optimiser steps of a client in a round.
        examples: of a client.
        batch: examples of a step.
        held_out: examples on which a client evaluates, at most.
        threads: of torch.
    """

    data: Sequence[str]
    clients: int
    rounds: int
    steps: int
    examples: int = 100
    batch: int = 4
    held_out: int = 24
    threads: int = 2

    def to_json(self) -> str:
        """What `main` reads."""
        return json.dumps(asdict(self))

    @property
    def overrides(self) -> list[str]:
        """The fleet's file, but for its defaults."""
        return [
            f"rounds.num_rounds={self.rounds}", f"rounds.min_available_nodes={self.clients}",
            f"training.max_steps={self.steps}", f"training.batch_size={self.batch}",
            f"device.eval_examples={self.held_out}", f"simulation.examples={self.examples}",
            "simulation.trainer=real", "simulation.base=smollm2", f"simulation.threads={self.threads}",
            f"simulation.data={json.dumps(list(self.data))}", "simulation.partition.kind=quantity",
            "simulation.partition.sigma=0",
            f'simulation.devices=[{{device = "laptop-x86-16gb", count = {self.clients}, name = "client"}}]',
        ]  # fmt: skip


class Watch:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def on(self, what: str, owner: Any, name: str) -> Iterator[None]:
        """Within it, calls of `owner.name` are timed as `what`."""
        real = getattr(owner, name)
        setattr(owner, name, self._timed(what, real))
        try:
            yield
        finally:
            setattr(owner, name, real)

    def _timed(self, what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return real(*args, **named)
            finally:
                self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - began

        return timed


def measure(run: Run) -> dict[str, Any]:
    """Simulate, and say what it took."""
    from edge_runtime.train import evaluating, loop  # noqa: PLC0415 - a parent of such processes needs no torch
    from simulation import real  # noqa: PLC0415 - as above

    watch = Watch()
    with (
        tempfile.TemporaryDirectory() as folder,
        watch.on("training", loop, "train_round"),
        watch.on("evaluating", evaluating, "evaluate"),
        watch.on("loading", real, "prepare"),
        watch.on("loading", real, "load"),
    ):
        began = time.perf_counter()
        world = World(*settings.load(None, run.overrides), Path(folder) / "out", say=_say)
        outcome = world.run()
        tables.write(Path(folder), "rounds", outcome.versions)
        tables.write(Path(folder), "devices", outcome.devices)
        seconds = time.perf_counter() - began
    client_rounds = sum(row.updates for row in outcome.versions)
    if not outcome.finished or client_rounds != run.clients * run.rounds:
        raise SystemExit(f"expected {run.clients * run.rounds} updates; found {client_rounds}: {outcome.why}")
    return {
        "seconds": seconds,
        **watch.seconds,
        "overhead": overhead(seconds, watch.seconds),
        "peak_mb": peak_bytes() / 1e6,
        "held_out": [row.held_out for row in outcome.versions],
    }


def alone(run: Run) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.simulation_real", run.to_json()]
    environ = {**os.environ, "OMP_NUM_THREADS": str(run.threads), "TOKENIZERS_PARALLELISM": "false"}
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environ).stdout
    measured: dict[str, Any] = json.loads(found.strip().splitlines()[-1])
    return measured


def overhead(seconds: float, spent: dict[str, float]) -> float:
    """The share of a simulation that is neither training nor the reading of the base; see this module's head.

    Args:
        seconds: of all of it.
        spent: on "training", "evaluating" and "loading".
    """
    whole = seconds - spent.get("loading", 0.0)
    return 1.0 - (spent["training"] + spent["evaluating"]) / whole


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    print(json.dumps(measure(Run(**json.loads(sys.argv[1])))))
