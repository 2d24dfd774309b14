"""The processes of benchmarks/simulation_peer.py: the same fleet by this simulator, and by Flower's.

    python -m benchmarks.simulation_peer_runs ours '{"base": …}'

prints one JSON object: when rounds ended by the monotonic clock, how many updates were merged, and the mean loss that
clients held out in each round.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Toy:
    """A fleet, all of whose clients take part in every round.

    Attributes:
        base: folder of the base, or its alias.
        data: JSONL files of examples, one for each client.
        clients: of the fleet.
        rounds: of the fleet.
        steps: optimiser steps of a client in a round.
        rank: of every adapted layer.
        length: tokens of an example, at most.
        batch: examples of a step.
        held_out: examples on which a client evaluates, at most.
        workers: processes that train at a time, each on one core.
    """

    base: str
    data: Sequence[str]
    clients: int
    rounds: int
    steps: int
    rank: int = 8
    length: int = 64
    batch: int = 4
    held_out: int = 4
    workers: int = 2

    def to_json(self) -> str:
        """What `main` reads."""
        return json.dumps(asdict(self))

    @property
    def overrides(self) -> list[str]:
        """The fleet's file."""
        return [
            f"rounds.num_rounds={self.rounds}", f"rounds.min_available_nodes={self.clients}",
            "aggregator.method=fedit", f"adapter.max_rank={self.rank}", f"adapter.max_length={self.length}",
            f"training.max_steps={self.steps}", f"training.batch_size={self.batch}", "training.warmup_steps=1",
            f"device.eval_examples={self.held_out}", "wire.codec_up=fp32", "wire.codec_down=fp32",
            "wire.error_feedback=false",  # of what arrives whole nothing is owed
            "simulation.trainer=real", "simulation.precision=fp32", f"simulation.base={self.base}",
            f"simulation.data={json.dumps(list(self.data))}", "simulation.partition.kind=natural",
            f"simulation.examples={100_000 // self.clients}",
            "simulation.engine=processes", f"simulation.workers={self.workers}",
            f'simulation.devices=[{{device = "laptop-x86-16gb", count = {self.clients}, name = "client"}}]',
        ]  # fmt: skip


def ours(toy: Toy) -> dict[str, Any]:
    """By this simulator."""
    from simulation import settings  # noqa: PLC0415 - a peak is a process's: each imports what it needs
    from simulation.world import World  # noqa: PLC0415 - as above

    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        world = World(*settings.load(None, toy.overrides), Path(folder), say=lambda text: print(text, file=sys.stderr))
        outcome = world.run(progress=lambda done, _of: ends.append(time.monotonic()) if done else None)
    return {
        "ends": ends,
        "client_rounds": sum(row.updates for row in outcome.versions),
        "held_out": [row.held_out for row in outcome.versions],
    }


def main(who: str, text: str) -> None:
    """Do what one process is asked for, and print what came of it."""
    toy = Toy(**json.loads(text))
    if who == "flower":
        from benchmarks.simulation_flower import flower  # noqa: PLC0415 - in an environment of its own

        found = flower(toy)
    else:
        found = ours(toy)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
