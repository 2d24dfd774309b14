"""Norm clipping: an increment longer than the bound is shortened to it; everybody stays in.

    c_k = min(1, bound / ||D_k||),   bound = max_norm, or `ratio` times the median norm of the round

Source: Sun, Kairouz, Suresh and McMahan, "Can You Really Backdoor Federated Learning?", 2019, arXiv 1911.07963 (norm
thresholding).

Differs from the paper: norms are of products and not of factors; without `max_norm` the bound follows the round.

Bounds how far a device reaches, not where to: any mean of clipped increments has at most the norm of the bound.
With `max_norm`, two halves of a device count as the whole does.

Cost: that of `geometry`.
"""

from __future__ import annotations

import math

import numpy as np

from server.aggregators.robust.geometry import Increments
from server.aggregators.robust.rule import Rule, Verdict, minority


def clip(*, byzantine: int = 1, ratio: float = 1.0, max_norm: float | None = None) -> Rule:
    """Increments of bounded norm.

    Args:
        byzantine: devices of a round that may send anything; with the median as yardstick it takes twice as many and
            one more.
        ratio: the bound as a multiple of the median norm.
        max_norm: the bound itself, Frobenius norm of all layers together; then no median is needed.

    Raises:
        ValueError: a ratio or norm that is not positive and finite.
    """
    f = minority(byzantine)
    for name, value in (("ratio", ratio), ("max_norm", max_norm)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"aggregator.{name} must be positive and finite; found {value}")
    least = 1 if max_norm is not None else 2 * f + 1

    def judge(found: Increments) -> Verdict:
        norms = found.norms
        bound = max_norm if max_norm is not None else ratio * float(np.median(norms))
        scales = {
            client: bound / float(norm) for client, norm in zip(found.clients, norms, strict=True) if norm > bound
        }
        return Verdict(scales=scales)

    return Rule(judge, least, 1)
