"""Zero-padding: factors of lower rank are extended with zero directions, then the factors are averaged.

    A+ = sum_k p_k pad(A_k),   B+ = sum_k p_k pad(B_k)

Source: Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models" (HetLoRA),
EMNLP 2024, its padding and truncation.

Differs from the paper: weights are counts of examples, not norms of products, and ranks are not pruned. A direction
that no device of the round trained keeps its value: padded with zeros it would be dead for ever, since a and b would
both have no gradient.

Bias: B+ A+ is not the mean of the products; it lacks the weighted covariance of the factors, and directions that few
devices hold are diluted.

Cost: O(devices x r x (d_out + d_in)) a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_runtime.lora.adapter import Pair
from edge_runtime.lora.algebra import norm, pad
from server.aggregators.layers import Engine, LayerResult, LayerTask, averaging, local
from server.aggregators.method import Aggregator, LayerReport


def zero_pad(engine: Engine = local, /) -> Aggregator:
    """HetLoRA's padded mean of factors; `engine` merges the layers."""
    return averaging(merge_layer, engine, exact=False, of_factors=True)


def merge_layer(task: LayerTask) -> LayerResult:
    """New global pair and report of one layer."""
    merged = mean(task.old, [(part.share, part.trained) for part in task.shares])
    # Nothing is truncated; what this method loses is the covariance, which only a dense reference would show.
    return LayerResult(merged, None, LayerReport(len(task.shares), norm(merged), 0.0, 0.0))


def mean(old: Pair, entries: Sequence[tuple[float, Pair]]) -> Pair:
    """Weighted mean of the padded factors; directions beyond the widest update stay as they were."""
    widest = max(pair.rank for _, pair in entries)
    a = np.sum([share * pad(pair, widest).a.astype(np.float64) for share, pair in entries], axis=0)
    b = np.sum([share * pad(pair, widest).b.astype(np.float64) for share, pair in entries], axis=0)
    return Pair(
        np.concatenate([a.astype(np.float32), old.a[widest:]]),
        np.concatenate([b.astype(np.float32), old.b[:, widest:]], axis=1),
    )
