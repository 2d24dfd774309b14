"""GLoRA: products are averaged in the coordinates of a subspace on which devices agree, whatever their factors are.

    U = the first r eigenvectors of sum_k p_k P(B_k A_k),   V = those of sum_k p_k P((B_k A_k)ᵀ)
    C = sum_k p_k Uᵀ B_k A_k V,   G+ = U C Vᵀ,   a device of rank r_j receives T_{r_j}(G+)

P(X) is the orthogonal projector onto the columns of X.

Source: Chen et al., "Beyond Factor Aggregation: Gauge-Aware Low-Rank Server Representations for Federated LoRA", arXiv
2605.06733, as far as its abstract says: a consensus subspace from client projectors, aggregation in shared reference
coordinates, and a readout for each rank. That projectors have the weights of the products, that the subspaces have the
rank of the global adapter, and that the readout is the SVD of C, is our reading.

Bias: what of the mean of products lies outside the consensus is lost, and reported. A projector does not see how large
a product is in which direction, so where devices agree on little, the subspace may miss what weighs most; `svd` takes
the nearest subspace instead. Like that one, it shrinks directions that only some devices have.

Cost: O((d_out + d_in) R²) a layer, R = sum r_k.
"""

from __future__ import annotations

import numpy as np

from edge_runtime.lora.algebra import Spectrum, Wide, decompose, refill, signed, size_of, stack, svd, to_pair
from server.aggregators.layers import Engine, LayerResult, LayerTask, averaging, local
from server.aggregators.method import Aggregator, LayerReport


def glora(engine: Engine = local, /) -> Aggregator:
    """The mean in consensus coordinates; `engine` merges the layers."""
    return averaging(merge_layer, engine, exact=False)


def merge_layer(task: LayerTask) -> LayerResult:
    """New global pair and report of one layer."""
    rank = task.old.rank
    parts = [(part.share, part.trained) for part in task.shares]
    columns, rows = [], []
    for share, pair in parts:
        found = decompose([(1.0, pair)])
        # All directions of a projector count alike: of more than there is room for, those that weigh most are meant.
        known = min(found.numerical_rank, rank)
        columns.append(np.sqrt(share) * found.u[:, :known])
        rows.append(np.sqrt(share) * found.vt[:known].T)
    u, v = (_leading(np.concatenate(side, axis=1), rank) for side in (columns, rows))
    left, right = stack(parts)
    inner, s, outer = svd((u.T @ left) @ (right @ v))
    merged = signed(Spectrum(u @ inner, s, outer @ v.T))
    whole = size_of(left, right)
    # Through the difference itself: that of the squares would only be rounding where little is lost.
    lost = size_of(np.concatenate([left, -merged.u * s], axis=1), np.concatenate([right, merged.vt]))
    report = LayerReport(len(parts), whole, lost, lost, lost, "consensus", f"{u.shape[1]} by {v.shape[1]} directions")
    kept = to_pair(merged, 0, min(rank, merged.numerical_rank))
    return LayerResult(refill(kept, rank, f"{task.version}:{task.name}"), None, report)


def _leading(side: Wide, rank: int) -> Wide:
    """The first eigenvectors of side @ sideᵀ, as many as it has and at most `rank`; (d, r)."""
    vectors, values, _ = svd(side)
    kept = int(np.count_nonzero(values[:rank] > np.finfo(np.float32).eps))
    return vectors[:, :kept]
