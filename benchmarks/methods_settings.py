"""Who is compared in `benchmarks.methods`, where, and at which learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.methods_fleet import LARGEST, SMALLEST, Rate, Way

UNEQUAL = (2, 2, 2, 2, 4, 4, 4, 8, 16, LARGEST)
TUNING_SEED = 1000


def _grid(grid: Mapping[float, tuple[float, ...]]) -> tuple[Rate, ...]:
    return tuple(Rate(largest, exponent) for exponent, rates in grid.items() for largest in rates)


@dataclass(frozen=True)
class Course:
    """How long fleets learn, and at which rates each way is tried before.

    Attributes:
        rounds: of a life.
        tuning_rounds: of a life by which a rate is chosen.
        finalists: rates that are then compared in all rounds, with the best at half its rate; 1 for none.
        steps: optimiser steps of a device in a round.
        grid: the rank that a way asks of all devices, 0 for none → rates; where all ranks are alike, an exponent is but
            a factor.
        quick: those of them that tell whether it runs.
        whole: whether lives end with what devices hold of the last version and with their personal models.
    """

    rounds: int
    tuning_rounds: int
    finalists: int
    steps: int
    grid: Mapping[int, tuple[Rate, ...]]
    quick: tuple[Rate, ...]
    whole: bool = True

    def rates(self, way: str) -> tuple[Rate, ...]:
        """Those that are tried for a way."""
        return self.grid[WAYS[way].rank]


_ALIKE = {0.0: (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)}
_UNLIKE = {**_ALIKE, 0.5: (1e-3, 2e-3, 4e-3), 0.75: (5e-4, 1e-3, 2e-3, 4e-3)}
LABELS = Course(
    24, 12, 2, 8,
    {0: _grid(_UNLIKE), SMALLEST: _grid(_ALIKE), LARGEST: _grid(_ALIKE)},
    quick=_grid({0.0: (2e-3,), 0.75: (1e-3,)}),
)  # fmt: skip
ANSWERS = Course(
    10, 10, 1, 6,
    {
        0: _grid({0.5: (2e-3, 4e-3, 8e-3)}),
        SMALLEST: _grid({0.0: (8e-3, 1.6e-2)}),
        LARGEST: _grid({0.0: (2e-3, 4e-3, 8e-3)}),
    },
    quick=_grid({0.0: (4e-3, 8e-3), 0.5: (4e-3,)}), whole=False,
)  # fmt: skip
"""A life takes minutes of a core, so there are few rates, and one exponent: with it the steps of all devices are of one
size in the product of their factors."""


@dataclass(frozen=True)
class Setting:
    """Who has which texts, which ranks there are, and what is learnt.

    Attributes:
        data: folder below `--data`.
        alpha: see `wire_fleet.dealt`.
        ranks: of the devices.
        tuned_on: the setting in which rates are chosen.
        course: of its fleets, and of the choice of rates.
        causal: whether a causal language model learns to answer, and not an encoder to tell labels.
    """

    data: str
    alpha: float
    ranks: tuple[int, ...] = UNEQUAL
    tuned_on: str = "pilot"
    course: Course = LABELS
    causal: bool = False


SETTINGS: Mapping[str, Setting] = {
    "pilot": Setting("natural-instructions", 0.3),
    "dirichlet-0.1": Setting("natural-instructions", 0.1),
    "dirichlet-0.5": Setting("natural-instructions", 0.5),
    "iid": Setting("natural-instructions", math.inf),
    "natural": Setting("natural-instructions", 0.0),
    "sst2": Setting("sst2", 0.5),
    "ranks-alike": Setting("natural-instructions", 0.3, (8,) * 10),
    "ranks-apart": Setting("natural-instructions", 0.3, (4, 4, 4, 4, 8, 8, 8, 8, 16, 16)),
    "smollm2-natural": Setting(
        "natural-instructions", 0.0, (2, 2, 2, 4, 4, 8, 16, LARGEST), "smollm2-natural", ANSWERS, causal=True
    ),
}
"""Setting → its texts and ranks. In "natural" each task is on one device alone; in "ranks-alike",
"ranks-apart" and "pilot" ranks of about one sum are ever farther apart: the survey's second question."""

EQUAL = ("fedit", "ffa_lora", "rolora", "fedsa_lora", "pf2lora", "lora_fair", "fedex_lora")
UNEQUAL_ONES = ("zero_pad", "rbla", "raflora", "florist", "glora", "fed_sb")
HOLDING = ("svd", "zero_pad", "rbla", "raflora")
"""Methods whose merge looks at what was trained alone, so that their devices may as well hold more."""
OURS, SAME = Way("increment"), Way("increment", LARGEST)
CENTRAL = Way("increment", LARGEST, central=True)
FRESH, SAME_FRESH = Way("increment", slice="fresh"), Way("increment", LARGEST, slice="fresh")
RIVALS = (Way("svd"), Way("hetlora"), Way("flora"))


def falling(way: Way) -> Way:
    """The same with a learning rate that falls over the fleet's rounds."""
    return replace(way, falls="linear")


WAYS: Mapping[str, Way] = {
    way.name: way
    for way in (
        OURS,
        FRESH,
        Way("increment", holds="prefix"),
        *RIVALS,
        *(Way(name) for name in UNEQUAL_ONES),
        *(Way(name, holds="all") for name in HOLDING),
        *(Way(name, SMALLEST) for name in EQUAL),
        Way("fedit", LARGEST),
        SAME,
        SAME_FRESH,
        CENTRAL,
        *(falling(way) for way in (OURS, *RIVALS, SAME, FRESH, SAME_FRESH, Way("fedex_lora", SMALLEST))),
    )
}
