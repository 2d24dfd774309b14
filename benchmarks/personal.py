"""Which way to a personal adapter is worth what, and does what a device learnt for itself survive a new version?

    python -m benchmarks.personal [--quick]

Six devices of rank 8 name the task that a text is the answer of (Dirichlet 0.3; three take part in a round), by the
three methods that the ways need, from the same seeds. Then each device makes its own adapter by each way, in the same
number of steps, and is judged on texts that it held out for itself: base, global (as the rounds left the device, with
its private part where it has one), personal, and delivered, the better of the last two by other texts of its own. A
figure `<way>_vs_global` is the personal loss over the global one: below 1, the personal adapter is better.

`carried_vs_global`: personal changes of the version half-way, re-based onto the last one without another step, against
that version alone; `by_rows_vs_global` the same where they are laid over its rows as they are.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import wire_fleet
from benchmarks.personal_fleet import DEVICES, RANK, Carried, Kind, Life, Losses
from benchmarks.result import Goal, result
from benchmarks.slices import interval

KINDS = (
    Kind("finetune"),
    Kind("finetune", proximal=0.1),
    Kind("beside"),
    Kind("private_factor", "fedsa_lora"),
    Kind("two_level", "pf2lora"),
)
GOALS: Mapping[str, Goal] = {
    **{f"{kind.way}_vs_global": ("<", 1.0) for kind in KINDS if not kind.proximal},
    "worst_delivered_vs_global": ("<=", 1.02),
    "carried_vs_global": ("<", 1.0),
    "carried_vs_by_rows": ("<=", 1.0),
}
"""Each way is worth its steps; what a device leaves with is on average hardly worse than the global adapter, whichever
the way; and what is re-based is still worth having."""

Found = Mapping[Kind, Sequence[Sequence[Losses]]]
"""Way → of each seed, of each device."""


def main() -> int:
    """Run it; the exit code says whether the goals are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/natural-instructions"))
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--steps", type=int, default=8, help="local optimiser steps of a round")
    parser.add_argument("--personal-steps", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="one seed, two rounds: does it run?")
    options = parser.parse_args()
    rounds, seeds = options.rounds or (2 if options.quick else 6), options.seeds or (1 if options.quick else 3)
    console = Console()
    found: dict[Kind, list[list[Losses]]] = {kind: [] for kind in KINDS}
    carried: list[list[Carried]] = []
    for seed in range(seeds):
        started = time.monotonic()
        torch.manual_seed(seed)
        fleet = wire_fleet.build(options.data, seed, (RANK,) * DEVICES)
        for method in dict.fromkeys(kind.method for kind in KINDS):
            life, before = Life(fleet, method, options.steps, seed), None
            for number in life.rounds(rounds):
                if number == max(1, rounds // 2) and method == KINDS[0].method:
                    before = life.personalise(KINDS[0], options.personal_steps)
            if before is not None:
                carried.append(life.carried(before))
            for kind in (kind for kind in KINDS if kind.method == method):
                found[kind].append(life.made(kind, options.personal_steps))
        console.print(f"seed {seed}: {time.monotonic() - started:.0f} s", style="dim")
    console.print(table(found))
    return 0 if result("personal", figures(found, carried), GOALS) else 1


def mean(devices: Sequence[Losses] | Sequence[Carried], name: str) -> float:
    """The mean loss over devices, each with the same weight."""
    return statistics.mean(float(getattr(device, name)) for device in devices)


def figures(found: Found, carried: Sequence[Sequence[Carried]]) -> dict[str, object]:
    """What the RESULT line says: ratios of mean losses, seed by seed."""

    def ratio(name: str, seeds: Sequence[Sequence[Losses]] | Sequence[Sequence[Carried]], one: str, other: str) -> None:
        values = [mean(devices, one) / mean(devices, other) for devices in seeds]
        told[name] = round(statistics.mean(values), 4)
        if len(values) > 1:
            told[f"{name}_95"] = round(interval(values), 4)

    told: dict[str, object] = {}
    for kind, seeds in found.items():
        name = f"{kind.way}_pulled" if kind.proximal else kind.way
        ratio(f"{name}_vs_global", seeds, "personal", "merged")
        ratio(f"{name}_delivered_vs_global", seeds, "delivered", "merged")
        ratio(f"{name}_vs_base", seeds, "personal", "base")
        told[f"{name}_kept_global"] = sum(not device.keeps for devices in seeds for device in devices)
    delivered = [float(str(told[name])) for name in told if name.endswith("delivered_vs_global")]
    told["worst_delivered_vs_global"] = max(delivered)
    ratio("carried_vs_global", carried, "carried", "merged")
    ratio("by_rows_vs_global", carried, "by_rows", "merged")
    ratio("carried_vs_by_rows", carried, "carried", "by_rows")
    return {**told, "seeds": len(carried), "devices": DEVICES}


def table(found: Found) -> Table:
    """For people: mean over seeds and devices."""
    made = Table(title="loss on devices' own held-out texts, nats", title_style="bold")
    for column in ("way", "fleet's method", "base", "global", "personal", "delivered", "global kept by"):
        made.add_column(column, justify="left" if column in {"way", "fleet's method"} else "right")
    for kind, seeds in found.items():
        shown = [
            f"{statistics.mean(mean(devices, name) for devices in seeds):.3f}"
            for name in ("base", "merged", "personal", "delivered")
        ]
        all_devices = [device for devices in seeds for device in devices]
        kept = f"{sum(not device.keeps for device in all_devices)} of {len(all_devices)}"
        made.add_row(kind.name, kind.method, *shown, kept)
    return made


if __name__ == "__main__":
    sys.exit(main())
