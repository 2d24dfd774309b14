"""How an update that a rule has changed is said to a method, which reads updates in a form of its own.

What must come out is the product R_k + c (B_k A_k - R_k). A method that adds increments multiplies by the discount. One
that averages products gets the two terms side by side, at twice the rank. One that averages factors gets a pair of the
old rank in a canonical form: orthonormal rows of `a`, rotated onto the slice that the device received. Such a method
depends on the factorisation, and a device that sends (B M, M^-1 A) with a huge M would ruin the mean of `a` with a
product that looks like everybody's.

Where one change takes the place of all updates, it is the change of no slice, or, for methods that average, the product
that all devices returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from edge_runtime.lora.adapter import Adapter, Deferred, Pair
from edge_runtime.lora.algebra import ROW_NORM, change, changed, cut, decompose, pad, svd, to_pair, zero
from edge_runtime.lora.rotation import align
from server.aggregators.method import Aggregator, State, Update


def scaled(method: Aggregator, update: Update, factor: float) -> Update:
    """The update whose increment is `factor` times as large, as this method reads it."""
    if method.increments:
        return replace(update, discount=update.discount * factor)
    if not method.of_factors:
        return update if factor == 1.0 else _side_by_side(update, factor)
    trained = {name: canonical(update.received[name], pair, factor) for name, pair in update.trained.items()}
    return replace(update, trained=Adapter(trained))


def _side_by_side(update: Update, factor: float) -> Update:
    received, trained = {}, {}
    for name, after in update.trained.items():
        before = update.received[name]
        b = np.concatenate([factor * after.b, (1.0 - factor) * before.b], axis=1).astype(np.float32)
        trained[name] = Pair(np.concatenate([after.a, before.a]), b)
        received[name] = pad(before, trained[name].rank)
    return replace(update, received=Adapter(received), trained=Adapter(trained))


def terms(method: Aggregator, update: Update, layer: str) -> list[tuple[float, Pair]]:
    """What this method merges of a layer of an update, as a weighted sum of products."""
    if method.increments:
        return [(update.discount, update.trained[layer]), (-update.discount, update.received[layer])]
    return [(1.0, update.trained[layer])]


def instead(method: Aggregator, state: State, found: Adapter, widest: Mapping[str, int], name: str) -> Update:
    """The only update of a merge, in the place of all.

    Args:
        method: that reads it.
        state: that it is merged into.
        found: what the changes of all come to, each as `terms` gives it.
        widest: layer → largest rank that a device trained; directions beyond it keep their factors where those are
            averaged.
        name: of the update.
    """
    if not method.of_factors:
        sizes = found.sizes
        nothing = Deferred(sizes, lambda layer: zero(sizes[layer][:2], sizes[layer][2]))
        return Update(name, 1.0, Adapter(nothing), found)
    received = Adapter({layer: cut(state.adapter[layer], rank) for layer, rank in widest.items()})
    trained = Adapter({layer: canonical(pair, found[layer]) for layer, pair in received.items()})
    return Update(name, 1.0, received, trained)


def canonical(received: Pair, trained: Pair, factor: float = 1.0) -> Pair:
    """The pair of `received`'s rank nearest to the product R + factor (B A - R), rotated onto `received`.

    Directions without a product keep the rows that the device received, as far as they are free.
    """
    if np.array_equal(received.a, trained.a) or np.array_equal(received.b, trained.b):
        # One factor is the fleet's: the product is linear in the other, which nobody can have in another gauge.
        by = change(trained, received)
        return changed(received, Pair(np.float32(factor) * by.a, np.float32(factor) * by.b))
    spectrum = decompose([(factor, trained), (1.0 - factor, received)])
    found = to_pair(spectrum, 0, min(received.rank, spectrum.numerical_rank))
    wide = received.a.astype(np.float64)
    rows = found.a.astype(np.float64) / ROW_NORM
    _, _, rest = svd(wide - (wide @ rows.T) @ rows)
    free = (ROW_NORM * rest[: received.rank - found.rank]).astype(np.float32)
    whole = Pair(np.concatenate([found.a, free]), pad(found, received.rank).b)
    turn = align(received, whole).rotation
    return Pair((turn @ whole.a).astype(np.float32), (whole.b @ turn.T).astype(np.float32))
