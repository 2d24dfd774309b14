"""FedIT: the weighted mean of the factors, at one rank for all.

    A+ = sum_k p_k A_k,   B+ = sum_k p_k B_k

Source: Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning" (Shepherd), arXiv 2305.05644.

Differs from the paper: the LoRA scale is folded into B; it is one number of the fleet, so the result is the same.

Bias: B+ A+ is not the mean of the products. It lacks the weighted covariance of the factors,
sum_{j<k} p_j p_k (B_j - B_k)(A_j - A_k), of second order in how far devices drift apart.

Cost: O(devices x r x (d_out + d_in)) a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from edge_runtime.errors import AggregationError
from edge_runtime.lora.adapter import Matrix, Pair
from edge_runtime.lora.algebra import norm
from server.aggregators.layers import Engine, LayerResult, LayerTask, averaging, local
from server.aggregators.method import Aggregator, Asks, LayerReport, everything


def fedit(engine: Engine = local, /) -> Aggregator:
    """The mean of factors; `engine` merges the layers."""
    return mean_of_factors(engine, everything, exact=False)


def mean_of_factors(engine: Engine, asks: Callable[[int], Asks], *, exact: bool) -> Aggregator:
    """The method that averages whichever factors its rounds ask for.

    Args:
        engine: merges the layers.
        asks: what a round asks for.
        exact: whether that makes the merge the mean of products: it does where one factor is common to all.
    """
    return averaging(merge_layer, engine, exact=exact, asks=asks, equal_ranks=True, of_factors=True)


def merge_layer(task: LayerTask) -> LayerResult:
    """New global pair and report of one layer.

    Raises:
        AggregationError: an update of another rank.
    """
    for part in task.shares:
        if part.rank != task.old.rank:
            raise AggregationError(
                f"layer '{task.name}': a mean of factors needs rank {task.old.rank} of every device, found "
                f"{part.rank}; take a method for unequal ranks, such as increment"
            )
    merged = Pair(_mean(task, "a"), _mean(task, "b"))
    # Nothing is truncated; what is lost is the covariance, which only a dense reference would show.
    return LayerResult(merged, None, LayerReport(len(task.shares), norm(merged), 0.0, 0.0))


def _mean(task: LayerTask, factor: Literal["a", "b"]) -> Matrix:
    """The mean of one factor. What all devices have alike stays as it is to the last bit, and so does its blob."""
    total, first = np.zeros(getattr(task.old, factor).shape), None
    alike = True
    for part in task.shares:
        values: Matrix = getattr(part.trained, factor)
        first = values if first is None else first
        alike = alike and np.array_equal(values, first)
        total += part.share * values
    return first if first is not None and alike else total.astype(np.float32)
