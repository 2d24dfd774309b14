"""Who is compared in `benchmarks.methods`, where, and at which learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.methods_fleet import LARGEST, SMALLEST, Rate, Way

UNEQUAL = (2, 2, 2, 2, 4, 4, 4, 8, 16, LARGEST)
TUNING_SEED = 1000
RATES = tuple(
    Rate(largest, exponent)
    for exponent, rates in {
        0.0: (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
        0.5: (1e-3, 2e-3, 4e-3),
        0.75: (5e-4, 1e-3, 2e-3),
    }.items()
    for largest in rates
)
QUICK_RATES = (Rate(2e-3, 0.0), Rate(1e-3, 0.75))


@dataclass(frozen=True)
class Setting:
    """Who has which texts, and which ranks there are.

    Attributes:
        data: folder below `--data`.
        alpha: see `wire_fleet.build`.
        ranks: of the devices.
    """

    data: str
    alpha: float
    ranks: tuple[int, ...] = UNEQUAL


SETTINGS: Mapping[str, Setting] = {
    "pilot": Setting("natural-instructions", 0.3),
    "dirichlet-0.1": Setting("natural-instructions", 0.1),
    "dirichlet-0.5": Setting("natural-instructions", 0.5),
    "iid": Setting("natural-instructions", math.inf),
    "natural": Setting("natural-instructions", 0.0),
    "sst2": Setting("sst2", 0.5),
    "ranks-alike": Setting("natural-instructions", 0.3, (8,) * 10),
    "ranks-apart": Setting("natural-instructions", 0.3, (4, 4, 4, 4, 8, 8, 8, 8, 16, 16)),
}
"""Setting → its texts and ranks. In "natural" each task is on one device alone. The last two and "pilot" have ranks of
about one sum, ever farther apart: the survey's second question."""

EQUAL = ("fedit", "ffa_lora", "rolora", "fedsa_lora", "pf2lora", "lora_fair", "fedex_lora")
UNEQUAL_ONES = ("zero_pad", "rbla", "raflora", "florist", "glora", "fed_sb")
HOLDING = ("svd", "zero_pad", "rbla", "raflora")
"""Methods whose merge looks at what was trained alone, so that their devices may as well hold more."""
OURS, SAME = Way("increment"), Way("increment", LARGEST)
CENTRAL = Way("increment", LARGEST, central=True)
RIVALS = (Way("svd"), Way("hetlora"), Way("flora"))
WAYS: Mapping[str, Way] = {
    way.name: way
    for way in (
        OURS,
        Way("increment", slice="fresh"),
        Way("increment", holds="prefix"),
        *RIVALS,
        *(Way(name) for name in UNEQUAL_ONES),
        *(Way(name, holds="all") for name in HOLDING),
        *(Way(name, SMALLEST) for name in EQUAL),
        Way("fedit", LARGEST),
        SAME,
        Way("increment", LARGEST, slice="fresh"),
        CENTRAL,
    )
}
