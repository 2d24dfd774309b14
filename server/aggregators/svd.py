"""FlexLoRA: the truncated SVD of the weighted mean of absolute products.

    G+ = T_r( sum_k p_k B_k A_k )

Source: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
NeurIPS 2024.

Differs from the paper: nothing in the result. The dense d_out x d_in mean and its full SVD are never formed (thin QR
and a small core give the same factors), the LoRA scale is a number of the fleet and not fixed at 16/r, and rows of
`a` have the usual norm instead of 1.

Bias: a direction that only some devices can hold is multiplied by their share of the weight in every round, even in
one where nobody learns anything. `increment` has no such decay.

Cost a layer: that of a sum of R = sum r_k columns, see `edge_runtime.lora.sums`.
"""

from __future__ import annotations

from edge_runtime.lora.algebra import refill, to_pair
from edge_runtime.lora.sums import total
from server.aggregators.layers import Engine, LayerResult, LayerTask, averaging, local
from server.aggregators.method import Aggregator, LayerReport


def svd(engine: Engine = local, /) -> Aggregator:
    """FlexLoRA's merge, factored; `engine` merges the layers."""
    return averaging(merge_layer, engine, exact=True)


def merge_layer(task: LayerTask) -> LayerResult:
    """New global pair and report of one layer."""
    rank = task.old.rank
    found = total(
        ((part.share, part.trained) for part in task.shares),
        sum(part.rank for part in task.shares),
        rank,
        rank,
        seed=f"{task.version}:{task.name}:sum",
    )
    kept = to_pair(found.spectrum, 0, min(rank, found.spectrum.numerical_rank))
    lost = found.truncated(rank)
    report = LayerReport(len(task.shares), found.norm, lost, lost, found.certificate(rank), found.how, found.why)
    return LayerResult(refill(kept, rank, f"{task.version}:{task.name}"), None, report)
