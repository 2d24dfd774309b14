"""Geometric median: the point of least summed distance from all increments, as a weighted mean of them.

    z = argmin sum_k a_k ||D_k - z||,   w_k = a_k / ||D_k - z||   (Weiszfeld's fixed point)

Source: Pillutla, Kakade and Harchaoui, "Robust Aggregation for Federated Learning", IEEE TSP 2022 (RFA).

Differs from the paper: everything is in the span of the increments, so that Weiszfeld's steps need their inner products
and no increment; devices count alike, because a count of examples is a claim; a_k is the root of the share of layers
that the device trained, so that equal distances a layer give equal weights.

Bears any minority of devices: with f bad ones of n that all train the same layers, the result is within
2 (n - f) / (n - 2 f) times the largest distance of an honest increment from the honest mean.

Cost: that of `geometry`, and O(steps layers n^2).
"""

from __future__ import annotations

import numpy as np

from server.aggregators.robust.geometry import Increments, Wide
from server.aggregators.robust.rule import Rule, Verdict, minority

STEPS = 200
"""Of Weiszfeld, at most; far attackers make it converge in a few tens."""
SMOOTHING = 1e-6
"""Least distance, as a multiple of the median norm: at an increment itself the weight would be infinite."""
ENOUGH = 1e-12
"""Change of the normalised weights that ends it."""


def geometric_median(*, byzantine: int = 1) -> Rule:
    """Weights that pull towards the middle.

    Args:
        byzantine: devices of a round that may send anything.

    Raises:
        ValueError: not a whole number of 0 or more.
    """
    f = minority(byzantine)
    return Rule(_judge, 2 * f + 1, 2 * f + 1)


def _judge(found: Increments) -> Verdict:
    count = len(found.clients)
    coverage = np.sqrt(np.mean(list(found.trained.values()), axis=0))
    floor = SMOOTHING * float(np.median(found.norms))
    weights = coverage / coverage.sum()
    for _ in range(STEPS if floor > 0 else 0):
        pulled = coverage / np.maximum(_distances(found, weights), floor)
        pulled /= pulled.sum()
        done = float(np.abs(pulled - weights).max()) < ENOUGH
        weights = pulled
        if done:
            break
    return Verdict(weights={found.clients[index]: float(weights[index]) for index in range(count)})


def _distances(found: Increments, weights: Wide) -> Wide:
    """(n,) distance of each increment from the weighted mean, over the layers that its device trained."""
    squares = np.zeros(len(found.clients))
    for name, gram in found.grams.items():
        there = found.trained[name]
        shares = np.where(there, weights, 0.0)
        shares = shares / shares.sum()
        towards = gram @ shares
        squares += there * np.maximum(np.diagonal(gram) - 2 * towards + shares @ towards, 0.0)
    return np.asarray(np.sqrt(squares))
