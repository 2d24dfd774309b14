"""FlexLoRA: the truncated SVD of the weighted mean of absolute products.

    G+ = T_r( sum_k p_k B_k A_k )

Source: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
NeurIPS 2024.

Differs from the paper: nothing in the result. The dense d_out x d_in mean and its full SVD are never formed (thin QR
and a small core give the same factors), the LoRA scale is a number of the fleet and not fixed at 16/r, and rows of
`a` have the usual norm instead of 1.

Bias: a direction that only some devices can hold is multiplied by their share of the weight in every round, even in
one where nobody learns anything. `increment` has no such decay.

Cost for stacked rank R = sum r_k: O((d_out + d_in) R^2 + R^3) a layer.
"""

from __future__ import annotations

from collections.abc import Iterable

from edge_runtime.lora.algebra import decompose, refill, tail_norm, to_pair
from server.aggregators.layers import Engine, LayerResult, LayerTask, local, merge_layers
from server.aggregators.method import Aggregator, LayerReport, Merged, State, Update, fresh_state, prefix


def svd(engine: Engine = local, /) -> Aggregator:
    """FlexLoRA's merge, factored; `engine` merges the layers."""

    def combine(state: State, updates: Iterable[Update]) -> Merged:
        return merge_layers(state, updates, merge_layer, engine)

    return Aggregator(
        fresh_state, combine, prefix, lambda max_rank: max_rank, hold_more=False, exact=True, increments=False
    )


def merge_layer(task: LayerTask) -> LayerResult:
    """New global pair and report of one layer."""
    rank = task.old.rank
    spectrum = decompose((part.share, part.trained) for part in task.shares)
    kept = to_pair(spectrum, 0, min(rank, spectrum.numerical_rank))
    lost = tail_norm(spectrum, rank)
    report = LayerReport(len(task.shares), tail_norm(spectrum, 0), lost, lost)
    return LayerResult(refill(kept, rank, f"{task.version}:{task.name}"), None, report)
