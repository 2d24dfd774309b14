"""The trimmed mean of many entries at once: from either end of the sorted values so much mass is taken away.

    T = 1/(W - 2 cut)  integral of Q(m) dm  from cut to W - cut

Q is the weighted quantile function: devices sorted by value, each as wide as its mass. Whoever lies across the cut
counts with the part that is left. So T is continuous in the values and does not ask in which order equal ones come,
which trimming a number of devices of unequal mass would: of two equal values the lighter or the heavier would go.
"""

from __future__ import annotations

import numpy as np

from server.aggregators.robust.geometry import Wide
from server.aggregators.robust.rule import Trim


def trimmed(values: Wide, trim: Trim) -> tuple[Wide, Wide]:
    """The trimmed means, and what each device has to do with them.

    Args:
        values: (entries, n), the devices of an entry side by side.
        trim: of the n devices.

    Returns:
        (entries,) the means, and (entries, n) the part of each value, from 0 on, that lies between the outermost values
        that are left. Not the mass that is left: of equal values, rounding decides whose that is.
    """
    masses, ends = trim
    order = np.argsort(values, axis=1, kind="stable")
    ranked = np.take_along_axis(values, order, axis=1)
    low, high = ranked[:, ends, None], ranked[:, -1 - ends, None]
    cut = ends * masses.max()
    kept = np.diff(np.clip(np.cumsum(masses[order], axis=1), cut, masses.sum() - cut), axis=1, prepend=cut)
    # The outermost have no mass left; where rounding leaves some, it is not to be multiplied by 1e30.
    means = np.sum(kept * np.clip(ranked, low, high), axis=1) / np.sum(kept, axis=1)
    return means, np.clip(np.clip(values, low, high), np.minimum(values, 0.0), np.maximum(values, 0.0))


def outside(squares: Wide, trim: Trim) -> float:
    """What trimmed means of entries that are not computed may have as their Frobenius norm, at most.

    Two bounds, of which the smaller is taken; in both, the devices of the largest squares may be left out of the sums,
    so that no minority blows them up. With t devices trimmed at either end:

    - More than t devices lie at or beyond a value that is not trimmed. Leave out any j <= t: of the others at least
      t + 1 - j lie there, so its square is at most their sum of squares over as many.
    - A mean's square is at most the mean of the squares that are left, none with more than the largest mass. Leave out
      any t: for each that was left and is missing there is one beyond it, which was trimmed and is not missing.

    Args:
        squares: (n,) of each device, the sum of the squares of those entries.
        trim: of the n devices.
    """
    masses, ends = trim
    sums = np.cumsum(np.sort(squares))[::-1]
    beyond = min(sums[j] / (ends + 1 - j) for j in range(ends + 1))
    mean = sums[ends] * masses.max() / (masses.sum() - 2 * ends * masses.max())
    return float(np.sqrt(min(beyond, mean)))
