"""Which directions should a device train, and how many of which layer? And what do proximal term and correction gain?

    python -m benchmarks.slices [--quick] [--only policies | allocation | layers | terms]

Ten devices of ranks 2 to 32 name the task that a text is the answer of (Dirichlet 0.3; five take part in a round), once
by each way, from the same seeds in one process. A figure `x_vs_y` is the held-out loss of y over that of x at the end:
above 1, x is better. `top_vs_best` sets the default against the best of the other policies. Ranks by the spectrum are
tried twice, in layers of one size (`allocation`: query and value) and in every linear layer, of which some are 2.5
times larger (`layers`).
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
SPECTRUM_EVERYWHERE = Way(allocation="spectrum", every_linear=True)
PROXIMAL = Way(proximal=0.1)
CORRECTED = Way(correction=0.3)
QUESTIONS: Mapping[str, tuple[Way, ...]] = {
    "policies": POLICIES,
    "allocation": (SPECTRUM,),
    "layers": (SPECTRUM_EVERYWHERE,),
    "terms": (PROXIMAL, CORRECTED),
}
"""Question → the ways that answer it, beside the plain one of the same layers."""
Found = Mapping[Way, Sequence[Sequence[Round]]]
"""Way → of each seed, the rounds that were evaluated."""

STUDENT = (math.nan, math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""By the number of values: how many standard errors the 95 % interval of their mean reaches to either side."""


def main() -> int:
    """Run it; the exit code says whether the goals are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/natural-instructions"))
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--steps", type=int, default=8, help="local optimiser steps of a round")
    parser.add_argument("--only", action="append", choices=list(QUESTIONS), help="one question; may be said again")
    parser.add_argument("--quick", action="store_true", help="one seed, few rounds: does it run?")
    options = parser.parse_args()
    rounds, seeds = options.rounds or (4 if options.quick else 24), options.seeds or (1 if options.quick else 3)
    console = Console()
    wanted = [way for question in options.only or QUESTIONS for way in QUESTIONS[question]]
    ways = list(dict.fromkeys(one for way in wanted for one in (way.plain, way)))
    found: dict[Way, list[list[Round]]] = {way: [] for way in ways}
    for seed in range(seeds):
        for every_linear in sorted({way.every_linear for way in ways}):
            fleet = wire_fleet.build(options.data, seed, RANKS, every_linear=every_linear)
            for way in ways:
                if way.every_linear == every_linear:
                    found[way].append(_life(fleet, way, rounds, options.steps, seed, console))
    console.print(table(found, rounds))
    return 0 if result("slices", figures(found), GOALS if POLICIES[0] in found else {}) else 1


def _life(fleet: wire_fleet.Fleet, way: Way, rounds: int, steps: int, seed: int, console: Console) -> list[Round]:
    started = time.monotonic()
    torch.manual_seed(seed)
    ended = list(Life(fleet, way, steps, seed).run(rounds, max(1, rounds // 3)))
    told = f"{ended[-1].loss:.4f}, {ended[-1].accuracy:.3f}, {time.monotonic() - started:.0f} s"
    console.print(f"seed {seed}, {way.name}: {told}", style="dim")
    return ended


def gains(found: Found, way: Way, other: Way) -> list[float]:
    """Of each seed, the final loss of `other` over that of `way`."""
    return [theirs[-1].loss / own[-1].loss for own, theirs in zip(found[way], found[other], strict=True)]


def interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean, by Student's t; NaN for a single value."""
    return STUDENT[min(len(values), len(STUDENT) - 1)] * spread(values)


def figures(found: Found) -> dict[str, object]:
    """What the RESULT line says."""

    def mean(way: Way) -> float:
        return statistics.mean(life[-1].loss for life in found[way])

    told: dict[str, object] = {f"{way.name} loss": round(mean(way), 4) for way in found}
    others = [way for way in POLICIES if way in found]
    if others:
        best = min(others, key=mean)
        told |= _compared("top_vs_best", gains(found, TOP, best)) | {"best_other": best.slice}
    named = {
        "allocation_vs_uniform": SPECTRUM,
        "allocation_vs_uniform_every_linear": SPECTRUM_EVERYWHERE,
        "proximal_vs_none": PROXIMAL,
        "correction_vs_none": CORRECTED,
    }
    for name, way in named.items():
        if way in found:
            told |= _compared(name, gains(found, way, way.plain))
    return {**told, "seeds": len(next(iter(found.values())))}


def _compared(name: str, values: Sequence[float]) -> dict[str, float | None]:
    half = interval(values)
    return {name: round(statistics.mean(values), 4), f"{name}_95": None if math.isnan(half) else round(half, 4)}


def table(found: Found, rounds: int) -> Table:
    """For people: every way's rounds that were evaluated, and how it compares with the defaults in the same layers."""
    made = Table(title=f"held-out loss (and accuracy) by round; {rounds} in all", title_style="bold")
    made.add_column("way")
    for number in range(len(next(iter(found.values()))[0])):
        made.add_column(f"point {number + 1}", justify="right")
    made.add_column("the default's loss over this, ± half of the 95 % interval", justify="right")
    made.add_column("numbers trained", justify="right")
    for way, lives in found.items():
        points = []
        for at in range(len(lives[0])):
            loss, right = (statistics.mean(getattr(life[at], name) for life in lives) for name in ("loss", "accuracy"))
            points.append(f"{loss:.3f} ({right:.3f})")
        gained = gains(found, way, way.plain)
        told = f"{statistics.mean(gained):.3f} ± {interval(gained):.3f}"
        made.add_row(way.name, *points, told, str(lives[0][-1].numbers))
    return made


if __name__ == "__main__":
    sys.exit(main())
