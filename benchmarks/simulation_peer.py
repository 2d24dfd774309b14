"""Side by side with Flower's simulation engine: benchmarks/simulation.py's part that needs `make peers`.

Both simulate the same fleet (`simulation_peer_runs`) with two workers of one core each, in turn. A figure is the ratio
of medians. Speed is judged twice: of the whole run, from the start of the process to its end, and of the rounds after
the first, when all workers have loaded what they keep; the goal holds for the lower of the two. Memory is the sum of
the proportional set sizes of all processes of a run, at its largest: Ray's own processes and its store of objects
count, and what several processes map counts once.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.bases import random_base
from benchmarks.proportional import on_path, watched
from benchmarks.simulation_peer_runs import Toy
from edge_runtime.config import cache_dir

OVERLAY = Path(".overlay-flower")
HOW = "make peers"
ALIKE = 1e-3
"""Losses that two runs held out may be apart, relatively: they sum in another order."""
QUIET = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
UNWATCHED = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True)
class Ran:
    """One run.

    Attributes:
        seconds: of all of it.
        until_first: seconds until the first round was merged.
        rate: client-rounds a second, of the rounds after the first.
        whole_rate: client-rounds a second, of all of it.
        peak_mb: of all processes.
        processes: when it was largest.
        held_out: loss that clients held out, by round.
    """

    seconds: float
    until_first: float
    rate: float
    whole_rate: float
    peak_mb: float
    processes: int
    held_out: Sequence[float]


def toy_of(files: Sequence[str], *, quick: bool) -> Toy:
    """The fleet that is simulated: a model so small that what lies around training shows.

    Args:
        files: of examples, one for each client.
        quick: fewer clients and rounds.
    """
    base = random_base("llama-toy", cache_dir())
    clients, rounds = (4, 3) if quick else (32, 12)
    return Toy(base, files[:clients], clients, rounds, steps=1, batch=2, length=32, held_out=1)


def installed(overlay: Path) -> bool:
    """Whether Flower is there."""
    return (overlay / "flwr").is_dir() and (overlay / "ray").is_dir()


def run(who: str, toy: Toy, overlay: Path) -> Ran:
    """One run in processes of its own.

    Raises:
        SystemExit: it fails, or not all updates arrived.
    """
    environ = {**(on_path(overlay.absolute()) if who == "flower" else os.environ), **QUIET, **UNWATCHED}
    found = watched([sys.executable, "-m", "benchmarks.simulation_peer_runs", who, toy.to_json()], environ)
    told: dict[str, Any] = json.loads(found.output.strip().splitlines()[-1])
    ends, updates = told["ends"], toy.clients * toy.rounds
    if told["client_rounds"] != updates or len(ends) != toy.rounds:
        raise SystemExit(f"{who}: expected {updates} updates; found {told['client_rounds']}")
    return Ran(
        found.seconds, ends[0] - found.began, (updates - toy.clients) / (ends[-1] - ends[0]), updates / found.seconds,
        found.peak / 1e6, found.processes, told["held_out"],
    )  # fmt: skip


def side_by_side(toy: Toy, overlay: Path, repetitions: int) -> dict[str, list[Ran]]:
    """Both in turn, so often.

    Raises:
        SystemExit: they do not learn the same.
    """
    found: dict[str, list[Ran]] = {"ours": [], "flower": []}
    for _ in range(repetitions):
        for who, ran in found.items():
            ran.append(run(who, toy, overlay))
            print(f"{who}: {ran[-1]}", file=sys.stderr)
    for mine, theirs in zip(found["ours"][0].held_out, found["flower"][0].held_out, strict=True):
        if abs(mine - theirs) > ALIKE * abs(theirs):
            raise SystemExit(f"both should learn the same; ours held out {mine}, Flower's {theirs}")
    return found


def figures_of(found: Mapping[str, Sequence[Ran]]) -> dict[str, float]:
    """The ratios, ours to Flower's."""
    rate, whole, peak = (_ratio(found, what) for what in ("rate", "whole_rate", "peak_mb"))
    return {
        "flower_speed_ratio": min(rate, whole),
        "flower_speed_ratio_steady": rate,
        "flower_speed_ratio_whole": whole,
        "flower_memory_ratio": peak,
    }


def _ratio(found: Mapping[str, Sequence[Ran]], what: str) -> float:
    return _median(found["ours"], what) / _median(found["flower"], what)


def _median(ran: Sequence[Ran], what: str) -> float:
    return statistics.median(float(getattr(each, what)) for each in ran)


def table(toy: Toy, found: Mapping[str, Sequence[Ran]]) -> Table:
    """The medians of both."""
    columns = {
        "seconds": "seconds", "until the first merge": "until_first", "client-rounds/s": "whole_rate",
        "after the first round": "rate", "peak, MB": "peak_mb", "processes": "processes",
    }  # fmt: skip
    shown = Table("", *columns, "loss", title=f"{toy.clients} clients, {toy.rounds} rounds, {toy.steps} steps")
    for who, ran in found.items():
        shown.add_row(who, *(f"{_median(ran, what):.1f}" for what in columns.values()), f"{ran[0].held_out[-1]:.4f}")
    return shown
