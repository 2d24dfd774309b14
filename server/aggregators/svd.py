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

from collections.abc import Iterable, Sequence

from edge_runtime.lora.adapter import Pair
from edge_runtime.lora.algebra import refill, to_pair
from edge_runtime.lora.sums import total
from server.aggregators.method import (
    Aggregator,
    LayerReport,
    Merged,
    State,
    Update,
    assembled,
    by_layer,
    fresh_state,
    prefix,
)


def svd() -> Aggregator:
    """FlexLoRA's merge, factored."""

    def combine(state: State, updates: Iterable[Update]) -> Merged:
        layers = by_layer(state, updates)
        return assembled(state, ((name, *_merge(state, name, entries)) for name, entries in layers.items()))

    return Aggregator(fresh_state, combine, prefix, lambda max_rank: max_rank, hold_more=False, exact=True)


def _merge(state: State, name: str, entries: Sequence[tuple[float, Update]]) -> tuple[Pair, None, LayerReport]:
    """New global pair and report of one layer."""
    rank = state.adapter.rank_of(name)
    found = total(
        ((share, update.trained[name]) for share, update in entries),
        sum(update.trained.rank_of(name) for _, update in entries),
        rank,
        rank,
        seed=f"{state.version + 1}:{name}:sum",
    )
    kept = to_pair(found.spectrum, 0, min(rank, found.spectrum.numerical_rank))
    lost = found.truncated(rank)
    report = LayerReport(len(entries), found.norm, lost, lost, found.certificate(rank), found.how, found.why)
    return refill(kept, rank, f"{state.version + 1}:{name}"), None, report
