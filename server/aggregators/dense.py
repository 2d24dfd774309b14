"""Dense tensors are merged entry by entry, under every method; see `edge_runtime.lora.dense`.

    G+[i] = G[i] + sum_k p_k d_k (A_k[i] - R_k[i]) / sum_k p_k        both sums over the devices that trained row i

R_k is what device k received, A_k the same after training, p_k its share of the examples, d_k its discount. A device
that did not train a row, because its prompt is shorter or its bottleneck narrower, has no say in it. With rows that
all have trained, the result is the weighted mean of what came back, exactly; nothing is truncated. A round in which
nobody learns anything changes nothing, bit for bit.

Source: the mean is FedAvg's (McMahan et al., AISTATS 2017); a mean over those who own a row is RBLA's (Chen et al.,
2024). A sum of increments without slices, such as a gateway's, owns the rows that it changes; it counts in each of them
with the examples of the whole layer, so behind gateways rows of unequal owners are weighed by gateway.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from edge_runtime.lora.adapter import Pair
from edge_runtime.lora.dense import as_pair, rows_of
from server.aggregators.method import LayerReport

Part = tuple[float, float, Pair, Pair]
"""Share, discount, what was received, and the same after training."""


def merge_rows(old: Pair, tail: Pair | None, parts: Iterable[Part]) -> tuple[Pair, LayerReport]:
    """New pair and report of one dense tensor.

    Args:
        old: of the global adapter; of no row in particular, where increments alone are summed up.
        tail: what is added besides, as a product, weighted already.
        parts: of those who trained the tensor.
    """
    moved = np.zeros(old.shape)
    weight, count = np.zeros(old.shape[0]), 0
    for share, discount, received, trained in parts:
        rows, change = _change(received, trained)
        moved[rows] += share * discount * change
        weight[rows] += share
        count += 1
    moved /= np.where(weight > 0, weight, 1.0)[:, None]
    if tail is not None:
        moved += tail.product()
    kept = rows_of(old)
    if kept is None:
        kept = np.flatnonzero(weight > 0)
        merged = as_pair(moved[kept].astype(np.float32), kept.tolist(), old.shape[0])
    else:
        merged = as_pair((old.a + moved[kept]).astype(np.float32), kept.tolist(), old.shape[0])
    return merged, LayerReport(count, float(np.linalg.norm(merged.a)), 0.0, 0.0, how="rows")


def _change(received: Pair, trained: Pair) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The rows that a device owns, and by how much it moved each."""
    rows = rows_of(received)
    if rows is not None:
        return rows, trained.a.astype(np.float64) - received.a
    change = trained.b.astype(np.float64) @ trained.a - received.b.astype(np.float64) @ received.a
    rows = np.flatnonzero(change.any(axis=1))
    return rows, change[rows]
