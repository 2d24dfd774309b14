"""What a device has for itself, moved onto another version of the global adapter.

A server that re-factorises hands out the same product in other rows, so nothing that lies in rows can be laid over a
new version as it is. Two things are moved, each in the way that keeps its function where the gauge alone has changed:

    a personal change ΔP     is kept as a product, which has no gauge: P = G + ΔP, cut to the rank that is held and
                             turned as near as it goes to the new rows, so that what is trained next are those rows
    a private factor B       of A is turned with A: R = argmin ‖A' - R A‖, B' = B Rᵀ

Cost O((d_out + d_in) R² + R³) for R columns side by side; no dense product is formed.

Source: the turning is the orthogonal Procrustes problem of `lora.rotation`; the cut is Eckart and Young's.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import cut, decompose, fresh_rows, take, to_pair
from edge_runtime.lora.dense import is_dense
from edge_runtime.lora.factors import Private
from edge_runtime.lora.rotation import SAME, align


def apart(personal: Adapter, fleet: Adapter) -> Adapter:
    """The personal change, of the layers that have one: pairs whose products are personal - fleet, exactly.

    Args:
        personal: layers of the same shapes and ranks as the fleet's.
        fleet: the global adapter that it was made of.
    """
    found = {}
    for name, pair in personal.items():
        moved = _apart(name, pair, fleet[name])
        if moved.rank:
            found[name] = moved
    return Adapter(found)


def carried(fleet: Adapter, change: Adapter) -> Adapter:
    """A version with a personal change in it, at the version's ranks, as near to its rows as that product comes.

    Exact where fleet + change has no higher rank than the fleet's pair, such as for a version that differs from the
    former one by its gauge alone; else the best approximation of that rank.

    Args:
        fleet: the version, as far as the device holds it.
        change: from `apart`; layers that the version lacks, or has in another shape, are left out.
    """
    return Adapter({name: _carried(name, pair, change) for name, pair in fleet.items()})


def turned(private: Adapter, received: Adapter, factor: Private) -> Adapter:
    """A private factor, turned with the factor beside which it was learnt to the one that was received.

    Args:
        private: both factors as the device had them at the end of its last round.
        received: the fleet's.
        factor: which of them is private, "a" or "b".

    Returns:
        The private factor beside the received one, of layers of the same shape and rank in both. Where the shared
        factors have too little in common for one to be a turned form of the other, it stays as it was.
    """
    found = {}
    for name, pair in private.items():
        if name in received and received[name].shape == pair.shape and received[name].rank == pair.rank:
            found[name] = _turned(pair, received[name], factor)
    return Adapter(found)


def of_rank(change: Pair, rank: int, seed: str) -> Pair:
    """A change at exactly that rank: its strongest directions, or all of them and room to learn in.

    Args:
        change: its product is kept, where its rank does not exceed the other.
        rank: at most the smaller side of the layer.
        seed: names the draw of the new rows, of which b is zero.
    """
    if change.rank == rank:
        return change
    if change.rank > rank:
        return to_pair(decompose([(1.0, change)]), 0, rank)
    rows = fresh_rows(change.a, rank - change.rank, seed)
    return beside(change, Pair(rows, np.zeros((change.shape[0], len(rows)), np.float32)))


def beside(first: Pair, second: Pair) -> Pair:
    """The sum of two products, one pair's directions behind the other's: exact."""
    return Pair(np.concatenate([first.a, second.a]), np.concatenate([first.b, second.b], axis=1))


def stacked(fleet: Adapter, personal: Mapping[str, Pair]) -> Adapter:
    """The fleet's adapter with personal pairs behind it, in the layers that have one: the sum of both, as one."""
    return Adapter({name: beside(pair, personal[name]) if name in personal else pair for name, pair in fleet.items()})


def last(pair: Pair, count: int) -> Pair:
    """The last so many directions."""
    return take(pair, range(pair.rank - count, pair.rank))


def _apart(name: str, personal: Pair, fleet: Pair) -> Pair:
    if is_dense(name):
        return Pair(personal.a - fleet.a, fleet.b) if (personal.a != fleet.a).any() else cut(fleet, 0)
    if personal.rank == fleet.rank:
        # Directions that did not move would only cancel.
        moved = (personal.a != fleet.a).any(axis=1) | (personal.b != fleet.b).any(axis=0)
        rows = np.flatnonzero(moved).tolist()
        personal, fleet = take(personal, rows), take(fleet, rows)
    found = decompose([(1.0, personal), (-1.0, fleet)])
    return to_pair(found, 0, found.numerical_rank)


def _carried(name: str, pair: Pair, change: Adapter) -> Pair:
    if name not in change or not pair.rank or change[name].shape != pair.shape:
        return pair
    moved = change[name]
    if is_dense(name):
        return Pair(pair.a + moved.a, pair.b) if np.array_equal(pair.b, moved.b) else pair
    whole = to_pair(decompose([(1.0, pair), (1.0, moved)]), 0, pair.rank)
    rotation = align(pair, whole).rotation
    a, b = rotation @ whole.a.astype(np.float64), whole.b.astype(np.float64) @ rotation.T
    return Pair(a.astype(np.float32), b.astype(np.float32))


def _turned(pair: Pair, received: Pair, factor: Private) -> Pair:
    if factor == "b":
        found = align(Pair(received.a, np.zeros_like(pair.b)), Pair(pair.a, np.zeros_like(pair.b)))
    else:
        found = align(Pair(np.zeros_like(pair.a), received.b), Pair(np.zeros_like(pair.a), pair.b))
    rotation = found.rotation if found.cosine >= SAME else np.eye(pair.rank)
    if factor == "b":
        return Pair(received.a, (pair.b.astype(np.float64) @ rotation.T).astype(np.float32))
    return Pair((rotation @ pair.a.astype(np.float64)).astype(np.float32), received.b)
