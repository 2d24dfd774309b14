"""Trimmed mean: of each entry, the `byzantine` largest and smallest are cut off, and the rest is averaged.

    w_k = min(examples of k, c),  c = the (2 f + 1)-th largest count,   cut = f c at either end   (`trimming`)

Source: Yin, Chen, Ramchandran and Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
ICML 2018 (coordinate-wise trimmed mean).

Differs from the paper: entries are those of products in a joint basis (`basis`), because factors of unequal rank, or of
one rank and another factorisation, have no entries in common; and devices count by their examples, with a cap. At least
2 f + 1 devices reach the cap, so f devices weigh less than half whatever they claim; with f = 0 there is none, and the
rule is the mean.

Bears f of n >= 2 f + 1 devices. What is left at an entry has a heavier mass on either side than f devices have, so an
honest device is on either side: the entry lies among honest ones, and with m their mean

    |T - m|² <= max_h |C_h - m|² <= sum_h |C_h - m|²  at each entry, so  ||T - m||² <= sum_h ||D_h - m||²

in any basis of all changes. Where the basis is cut, m is its part in there; the rest is in the report's `lost`.

A direction in which at most f devices move anything does not move, be it for want of rank: who of them is right, nobody
could tell.

Cost: that of `basis`, and O(n p q log n) for a basis of p and q directions.
"""

from __future__ import annotations

import numpy as np

from server.aggregators.robust.geometry import Wide
from server.aggregators.robust.rule import Coordinatewise, Trim, minority


def trimmed_mean(*, byzantine: int = 1) -> Coordinatewise:
    """The mean without the outermost at either end of each entry.

    Args:
        byzantine: f, devices of a round that may send anything.

    Raises:
        ValueError: f is not a whole number of 0 or more.
    """
    f = minority(byzantine)

    def trim(examples: Wide) -> Trim:
        return Trim(np.minimum(examples, np.sort(examples)[-1 - 2 * f]), f)

    return Coordinatewise(trim, 2 * f + 1, 2 * f + 1)
