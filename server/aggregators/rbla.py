"""RBLA: each direction is averaged over the devices that have it, in both factors.

    a+_i = sum_{k: r_k > i} p_k a_ki / sum_{k: r_k > i} p_k,   b+_i likewise

Source: Chen et al., "RBLA: Rank-Based-LoRA-Aggregation for Fine-Tuning Heterogeneous Models in FLaaS", arXiv
2408.08699.

Differs from the paper: weights are counts of examples; a direction that no device of the round has keeps its value.

Bias: nothing is diluted, but B+ A+ lacks the weighted covariance of the factors, direction by direction.

Cost: O(devices x r x (d_out + d_in)) a layer.
"""

from __future__ import annotations

import numpy as np

from edge_runtime.lora.adapter import Pair
from edge_runtime.lora.algebra import norm
from server.aggregators.layers import Engine, LayerResult, LayerTask, averaging, local
from server.aggregators.method import Aggregator, LayerReport


def rbla(engine: Engine = local, /) -> Aggregator:
    """The mean of each direction over those who have it; `engine` merges the layers."""
    return averaging(merge_layer, engine, exact=False, of_factors=True)


def merge_layer(task: LayerTask) -> LayerResult:
    """New global pair and report of one layer."""
    a, b, owned = task.old.a.astype(np.float64), task.old.b.astype(np.float64), owners(task)
    known = int(np.count_nonzero(owned))
    a[:known], b[:, :known] = 0.0, 0.0
    for part in task.shares:
        share, trained = part.share / owned[: part.rank], part.trained
        a[: part.rank] += share[:, None] * trained.a
        b[:, : part.rank] += share * trained.b
    merged = Pair(a.astype(np.float32), b.astype(np.float32))
    # Nothing is truncated; what is lost is the covariance, which only a dense reference would show.
    return LayerResult(merged, None, LayerReport(len(task.shares), norm(merged), 0.0, 0.0))


def owners(task: LayerTask) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """(r,): of each direction, the share of the weight of those who trained it; they are the first directions."""
    found = np.zeros(task.old.rank)
    for part in task.shares:
        found[: part.rank] += part.share
    return found
