"""HetLoRA: padded factors are averaged by the norms of their products, and devices prune their own ranks.

    A+ = sum_k w_k pad(A_k),   B+ = sum_k w_k pad(B_k),   w_k = ||B_k A_k|| / sum_j ||B_j A_j||

Devices add `penalty` ||B_t|| ||A_t|| to their loss, where the tail t is what lies beyond `gamma` times their rank; if
that product of norms shrank over a round, they go on without the tail.

Source: Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024, arXiv
2401.06432.

Differs from the paper: weights and pruning are of each layer by itself; a direction that no device of the round trained
keeps its value, as in `zero_pad`; where nobody has learnt anything, weights are counts of examples.

Bias: that of `zero_pad`. Besides, counts of examples have no say, and a device buys weight by a large norm.

Cost: O(devices x r² x (d_out + d_in)) a layer.
"""

from __future__ import annotations

from edge_runtime.lora.algebra import norm
from server.aggregators.layers import Engine, LayerResult, LayerTask, averaging, local
from server.aggregators.method import Aggregator, LayerReport
from server.aggregators.zero_pad import mean

GAMMA, PENALTY = 0.99, 1e-3


def hetlora(engine: Engine = local, /, *, gamma: float = GAMMA, penalty: float = PENALTY) -> Aggregator:
    """The padded mean of factors, weighted by norms.

    Args:
        engine: merges the layers.
        gamma: share of its directions that a device keeps when it prunes; 1 prunes nothing.
        penalty: strength of the pull on the tail.

    Raises:
        ValueError: a gamma outside (0, 1], or a negative penalty.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"aggregator.gamma must be above 0 and at most 1; found {gamma}")
    if not penalty >= 0:
        raise ValueError(f"aggregator.penalty must be 0 or more; found {penalty}")

    return averaging(
        merge_layer, engine, exact=False, of_factors=True, weighs=False,
        training={"kept": gamma, "tail_penalty": penalty},
    )  # fmt: skip


def merge_layer(task: LayerTask) -> LayerResult:
    """New global pair and report of one layer."""
    pairs = [(part.share, part.trained) for part in task.shares]
    norms = [norm(pair) for _, pair in pairs]
    if whole := sum(norms):
        pairs = [(size / whole, pair) for size, (_, pair) in zip(norms, pairs, strict=True)]
    merged = mean(task.old, pairs)
    return LayerResult(merged, None, LayerReport(len(pairs), norm(merged), 0.0, 0.0))
