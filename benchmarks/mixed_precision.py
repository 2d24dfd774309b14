"""What does a fleet lose whose devices have bases of unlike precision, and what does regaining their bases bring back?

    python -m benchmarks.mixed_precision [--quick] [--seeds N] [--rounds N] [--keep FOLDER]

An adapter over Q(W) learns a part of W - Q(W) beside its task, and a global adapter brings that to devices that lost
nothing. Ten devices of ranks 2 to 32 name the task that a text is the answer of, all at bf16, all at int8, all at nf4,
or mixed (the five of smallest rank at nf4, two at int8, three at bf16); and mixed once more with the 16 leading
directions of W - Q(W) regained in every adapted layer, frozen, beside the base, never sent: those that the weights lost
most by, or those that the outputs did. Same seeds, texts and steps. The global adapter of each fleet is judged over all
three bases, as that fleet's devices have them.

`bias` is how much of what nf4 lost the mixed fleet's adapter has learnt, in the inner product of the layers' outputs,
beyond what that of the bf16 fleet has by chance: 1 would be all of it. `bias_removed_by_X` is the part of that which is
gone with directions regained by X. `mixed_over_bf16_on_B` is the mixed fleet's loss over base B, divided by that of the
bf16 fleet over the same base, and `regained_by_X_over_mixed` the regained fleet's over the mixed one's, mean of the
bases; `nf4_over_bf16_base` what the bf16 fleet's adapter loses where it is put on an nf4 base. `X alone` is the
loss of SmolLM2 without any adapter, at precision X. With --keep, what fleets came to is kept there, and they are not
run again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import mixed_precision_bases, mixed_precision_fleet, wire_fleet
from benchmarks.mixed_precision_fleet import (
    MIXED,
    OPENED,
    SHARE,
    Learnt,
    Way,
    bases,
    energy_left,
    learnt,
    losses,
)
from benchmarks.result import Goal, result
from benchmarks.slices import interval
from benchmarks.wire_fleet import Fleet

REGAINED = 16
ALIKE = {precision: Way(precision, (precision,) * len(MIXED)) for precision in OPENED}
PLAIN = Way("mixed", MIXED)
BY_WEIGHTS = Way(f"mixed, {REGAINED} regained by weights", MIXED, REGAINED, "weights")
BY_OUTPUTS = Way(f"mixed, {REGAINED} regained by outputs", MIXED, REGAINED, "outputs")
WAYS = (*ALIKE.values(), PLAIN, BY_WEIGHTS, BY_OUTPUTS)
GOALS: Mapping[str, Goal] = {"regained_by_outputs_over_mixed": ("<", 1.0), "bias_removed_by_outputs": (">", 0)}
QUICK_TEXTS = 64


@dataclass(frozen=True)
class Outcome:
    """What one fleet came to: its losses by base, what its adapter has learnt of nf4's error, and what is left of it.

    Attributes:
        losses: precision → held-out loss in nats.
        learnt: of W - Q(W), before anything was regained.
        left: share of W - Q(W) of nf4 that is still lost, in squares: of the weights, and of the outputs.
    """

    losses: Mapping[str, float]
    learnt: Learnt
    left: tuple[float, float]


Found = Mapping[Way, Sequence[Outcome]]


def main() -> int:
    """Run it; the exit code says whether the goals are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/natural-instructions"))
    parser.add_argument("--keep", type=Path, help="folder for what fleets came to")
    parser.add_argument("--steps", type=int, default=8, help="local optimiser steps of a round")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed, one round: does it run?")
    options = parser.parse_args()
    rounds, seeds = (1, 1) if options.quick else (options.rounds, options.seeds)
    torch.set_num_threads(1)
    console = Console()
    found: dict[Way, list[Outcome]] = {way: [] for way in WAYS}
    texts = QUICK_TEXTS if options.quick else None
    for seed in range(seeds):
        life = Life(options.data, seed, rounds, options.steps, texts)
        for way, ended in life.outcomes(options.keep, console):
            found[way].append(ended)
    alone = {} if options.quick else _alone(options.data, console)
    console.print(table(found))
    return 0 if result("mixed_precision", {**figures(found), **alone}, GOALS) else 1


def _alone(data: Path, console: Console) -> dict[str, float]:
    found = {}
    for kept in mixed_precision_bases.KEPT:
        found[f"{kept.name} alone"] = round(mixed_precision_bases.loss(kept, data), 4)
        console.print(f"SmolLM2, {kept.name} alone: {found[f'{kept.name} alone']}", style="dim")
    return found


@dataclass(frozen=True)
class Life:
    """What all fleets of one seed have in common.

    Attributes:
        data: folder of the texts.
        seed: of texts, shares, head, and of everything that is drawn.
        rounds: how many.
        steps: optimiser steps of a device in a round.
        texts: held-out ones that are looked at; None for all.
    """

    data: Path
    seed: int
    rounds: int
    steps: int
    texts: int | None

    def outcomes(self, keep: Path | None, console: Console) -> Iterator[tuple[Way, Outcome]]:
        """Each way and what its fleet came to; what is kept is read, and what is run is kept."""
        fleet, seen = None, {}
        for way in WAYS:
            path = keep / f"{way.name}, {self.seed}, {self.rounds} x {self.steps}, {self.texts}.json" if keep else None
            if path is not None and path.exists():
                known = json.loads(path.read_text(encoding="utf-8"))
                yield way, Outcome(known["losses"], Learnt(**known["learnt"]), tuple(known["left"]))
                continue
            started = time.monotonic()
            if fleet is None:
                fleet = wire_fleet.build(self.data, self.seed, every_linear=True)
                seen = mixed_precision_fleet.inputs(fleet, [text.input_ids for text in fleet.held_out[::SHARE]])
            ended = self._outcome(fleet, way, seen)
            told = ", ".join(f"{name} {loss:.4f}" for name, loss in ended.losses.items())
            console.print(f"seed {self.seed}, {way.name}: {told}; {time.monotonic() - started:.0f} s", style="dim")
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(asdict(ended)), encoding="utf-8")
            yield way, ended

    def _outcome(self, fleet: Fleet, way: Way, seen: Mapping[str, torch.Tensor]) -> Outcome:
        own = bases(fleet, way)
        adapter = mixed_precision_fleet.live(own, way, rounds=self.rounds, steps=self.steps, seed=self.seed)
        return Outcome(
            losses(own, adapter, fleet.held_out[: self.texts]),
            learnt(adapter, own.lost["nf4"], seen),
            (energy_left(own, "nf4"), energy_left(own, "nf4", seen)),
        )


def beyond_chance(found: Found, way: Way) -> list[float]:
    """Of each seed, how much of nf4's error the adapter has learnt beyond that of the bf16 fleet."""
    return [
        one.learnt.of_outputs - other.learnt.of_outputs
        for one, other in zip(found[way], found[ALIKE["bf16"]], strict=True)
    ]


def over(found: Found, way: Way, other: Way, bases: Sequence[str] = tuple(OPENED)) -> list[float]:
    """Of each seed, the loss of a fleet over that of another, mean of these bases."""
    return [
        statistics.mean(one.losses[base] / reference.losses[base] for base in bases)
        for one, reference in zip(found[way], found[other], strict=True)
    ]


def figures(found: Found) -> dict[str, object]:
    """What the RESULT line says."""
    told: dict[str, object] = {}
    for way, ended in found.items():
        for base in OPENED:
            told[f"{way.name} on {base}"] = round(statistics.mean(one.losses[base] for one in ended), 4)
    bias = beyond_chance(found, PLAIN)
    told |= _estimate("bias", bias)
    for base in OPENED:
        told |= _estimate(f"mixed_over_bf16_on_{base}", over(found, PLAIN, ALIKE["bf16"], (base,)))
    told |= _estimate("nf4_over_bf16_base", _between_bases(found))
    for way in (BY_WEIGHTS, BY_OUTPUTS):
        left, name = beyond_chance(found, way), f"regained_by_{way.by}"
        removed = [1 - now / before for now, before in zip(left, bias, strict=True)]
        told |= _estimate(f"bias_removed_by_{way.by}", removed)
        told |= _estimate(f"{name}_over_mixed", over(found, way, PLAIN))
        for base in OPENED:
            told |= _estimate(f"{name}_over_mixed_on_{base}", over(found, way, PLAIN, (base,)))
        told[f"left_of_weights_{name}"] = round(statistics.mean(one.left[0] for one in found[way]), 4)
        told[f"left_of_outputs_{name}"] = round(statistics.mean(one.left[1] for one in found[way]), 4)
    return {**told, "seeds": len(found[PLAIN])}


def _between_bases(found: Found) -> list[float]:
    """Of each seed, the loss of the bf16 fleet's adapter over nf4 over that over bf16: what the base itself lost."""
    return [one.losses["nf4"] / one.losses["bf16"] for one in found[ALIKE["bf16"]]]


def _estimate(name: str, values: Sequence[float]) -> dict[str, float | None]:
    half = interval(values)
    return {name: round(statistics.mean(values), 5), f"{name}_95": None if math.isnan(half) else round(half, 5)}


def table(found: Found) -> Table:
    """For people: each fleet over each base, and what its adapter knows of nf4's error."""
    made = Table(title="held-out loss of the global adapter, mean ± half of the 95 % interval", title_style="bold")
    for column in ("fleet", *(f"over {base}" for base in OPENED), "learnt of nf4's error: weights", "outputs"):
        made.add_column(column, justify="left" if column == "fleet" else "right")
    for way, ended in found.items():
        by_base = [[one.losses[base] for one in ended] for base in OPENED]
        shares = [[one.learnt.of_weights for one in ended], [one.learnt.of_outputs for one in ended]]
        made.add_row(
            way.name,
            *(f"{statistics.mean(values):.3f} ± {interval(values):.3f}" for values in by_base),
            *(f"{statistics.mean(values):.3%} ± {interval(values):.3%}" for values in shares),
        )
    return made


if __name__ == "__main__":
    sys.exit(main())
