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

from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.algebra import decompose, refill, tail_norm, to_pair
from server.aggregators.method import Aggregator, LayerReport, Merged, State, Update, by_layer, fresh_state, prefix


def svd() -> Aggregator:
    """FlexLoRA's merge, factored."""

    def combine(state: State, updates: Iterable[Update]) -> Merged:
        layers, reports = dict(state.adapter), {}
        for name, entries in by_layer(state, updates).items():
            rank = state.adapter[name].rank
            spectrum = decompose((share, update.trained[name]) for share, update in entries)
            kept = to_pair(spectrum, 0, min(rank, spectrum.numerical_rank))
            layers[name] = refill(kept, rank, f"{state.version + 1}:{name}")
            lost = tail_norm(spectrum, rank)
            reports[name] = LayerReport(len(entries), tail_norm(spectrum, 0), lost, lost)
        return Merged(State(Adapter(layers), Adapter({}), state.version + 1), reports)

    return Aggregator(fresh_state, combine, prefix, lambda max_rank: max_rank, hold_more=False, exact=True)
