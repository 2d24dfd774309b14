"""Median: of each entry, the middle one; of an even number, the mean of the two in the middle.

Source: Yin, Chen, Ramchandran and Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
ICML 2018 (coordinate-wise median).

Differs from the paper: entries are those of products in a joint basis, as of `trimmed_mean`. Devices count alike,
because a count of examples is a claim.

Bears any minority of devices. With n of them, b of which are bad, n / 2 rounded up lie at or beyond what is left at an
entry, so at least that less b honest ones do: as of `trimmed_mean`, and with m the honest mean,

    ||T - m||² <= sum_h ||D_h - m||² / (ceil(n / 2) - b)

A direction in which fewer than half of the devices move anything does not move. Where many devices of small rank meet
few of large rank, `trimmed_mean` and `geometric_median` lose less.

Cost: that of `trimmed_mean`.
"""

from __future__ import annotations

import numpy as np

from server.aggregators.robust.geometry import Wide
from server.aggregators.robust.rule import Coordinatewise, Trim, minority


def median(*, byzantine: int = 1) -> Coordinatewise:
    """The middle of each entry.

    Args:
        byzantine: devices of a round that may send anything.

    Raises:
        ValueError: not a whole number of 0 or more.
    """
    f = minority(byzantine)
    return Coordinatewise(_trim, 2 * f + 1, 2 * f + 1)


def _trim(examples: Wide) -> Trim:
    return Trim(np.ones_like(examples), (examples.size - 1) // 2)
