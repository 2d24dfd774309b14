"""Which directions should a device train, and how many of which layer? And what do proximal term and correction gain?

    python -m benchmarks.slices [--quick]

Ten devices of ranks 2 to 32 name the task that a text is the answer of (Dirichlet 0.3; five take part in a round), once
by each way, from the same seeds in one process. A figure `x_vs_y` is the held-out loss of y over that of x at the end:
above 1, x is better. `top_vs_best` sets the default against the best of the other policies.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import wire_fleet
from benchmarks.result import Goal, result
from benchmarks.slices_fleet import RANKS, Life, Round, Way
from benchmarks.wire_learning import spread

GOALS: Mapping[str, Goal] = {"top_vs_best": (">=", 0.98)}
"""The default costs at most a fiftieth against whatever would have been best."""

TOP = Way()
POLICIES = tuple(Way(slice=name) for name in ("rotating", "fresh", "personal"))
SPECTRUM = Way(allocation="spectrum")
PROXIMAL = Way(proximal=0.1)
CORRECTED = Way(correction=0.3)
WAYS = (TOP, *POLICIES, SPECTRUM, Way(slice="personal", allocation="spectrum"), PROXIMAL, CORRECTED)


def main() -> int:
    """Run it; the exit code says whether the goals are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/natural-instructions"))
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--steps", type=int, default=8, help="local optimiser steps of a round")
    parser.add_argument("--only", default="", help="ways whose name has this in it, beside the default")
    parser.add_argument("--quick", action="store_true", help="one seed, few rounds: does it run?")
    options = parser.parse_args()
    rounds, seeds = options.rounds or (4 if options.quick else 24), options.seeds or (1 if options.quick else 3)
    console = Console()
    found: dict[Way, list[list[Round]]] = {}
    for seed in range(seeds):
        fleet = wire_fleet.build(options.data, seed, RANKS)
        for way in WAYS:
            if way == TOP or options.only in way.name:
                found.setdefault(way, []).append(_life(fleet, way, rounds, options.steps, seed, console))
    console.print(_table(found, rounds))
    return 0 if result("slices", figures(found), GOALS) else 1


def _life(fleet: wire_fleet.Fleet, way: Way, rounds: int, steps: int, seed: int, console: Console) -> list[Round]:
    started = time.monotonic()
    torch.manual_seed(seed)
    ended = list(Life(fleet, way, steps, seed).run(rounds, max(1, rounds // 3)))
    told = f"{ended[-1].loss:.4f}, {ended[-1].accuracy:.3f}, {time.monotonic() - started:.0f} s"
    console.print(f"seed {seed}, {way.name}: {told}", style="dim")
    return ended


def gains(found: Mapping[Way, Sequence[Sequence[Round]]], way: Way, other: Way) -> list[float]:
    """Of each seed, the final loss of `other` over that of `way`."""
    return [theirs[-1].loss / own[-1].loss for own, theirs in zip(found[way], found[other], strict=True)]


def figures(found: Mapping[Way, Sequence[Sequence[Round]]]) -> dict[str, object]:
    """What the RESULT line says."""

    def mean(way: Way) -> float:
        return statistics.mean(life[-1].loss for life in found[way])

    told: dict[str, object] = {f"{way.name} loss": round(mean(way), 4) for way in found}
    others = [way for way in POLICIES if way in found]
    if others:
        best = min(others, key=mean)
        told |= {"top_vs_best": _rounded(gains(found, TOP, best)), "best_other": best.slice}
    named = (("allocation_vs_uniform", SPECTRUM), ("proximal_vs_none", PROXIMAL), ("correction_vs_none", CORRECTED))
    for name, way in named:
        if way in found:
            told |= {name: _rounded(gains(found, way, TOP)), f"{name}_standard_error": _error(gains(found, way, TOP))}
    return {**told, "seeds": len(found[TOP])}


def _rounded(values: Sequence[float]) -> float:
    return round(statistics.mean(values), 4)


def _error(values: Sequence[float]) -> float | None:
    found = spread(values)
    return None if math.isnan(found) else round(found, 4)


def _table(found: Mapping[Way, Sequence[Sequence[Round]]], rounds: int) -> Table:
    table = Table(title=f"held-out loss (and accuracy) by round; {rounds} in all", title_style="bold")
    table.add_column("way")
    for number in range(len(found[TOP][0])):
        table.add_column(f"point {number + 1}", justify="right")
    table.add_column("top's loss over this, ± standard error", justify="right")
    table.add_column("numbers trained", justify="right")
    for way, lives in found.items():
        points = []
        for at in range(len(lives[0])):
            loss, right = (statistics.mean(getattr(life[at], name) for life in lives) for name in ("loss", "accuracy"))
            points.append(f"{loss:.3f} ({right:.3f})")
        gained = gains(found, way, TOP)
        table.add_row(
            way.name, *points, f"{statistics.mean(gained):.3f} ± {spread(gained):.3f}", str(lives[0][-1].numbers)
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
