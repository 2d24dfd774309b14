"""Rank bands: the global adapter is published once, cut by rank; a device fetches as many bands as it holds.

A device of rank 16 takes the bands 0..4, 4..8 and 8..16. What the server sends does not depend on how many devices
listen. Where a round leaves one factor as it is, or devices keep one for themselves, each factor is a blob of its own:
blobs are named by their content, so one that did not change is not fetched again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from edge_runtime.lora.adapter import Adapter, Deferred, Pair
from edge_runtime.lora.dense import first_rows, is_dense
from edge_runtime.wire.messages import Band


def edges_for(rank: int, edges: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open rank ranges that cover 0..rank, cut at the edges below it."""
    stops = sorted({edge for edge in edges if 0 < edge < rank} | {rank})
    return list(zip([0, *stops[:-1]], stops, strict=True))


def band(adapter: Adapter, start: int, stop: int) -> Adapter:
    """Directions start..stop of every layer that has any of them."""
    return Adapter(
        {
            name: Pair(np.ascontiguousarray(pair.a[start:stop]), np.ascontiguousarray(pair.b[:, start:stop]))
            for name, pair in adapter.items()
            if pair.rank > start
        }
    )


def join(bands: Sequence[Adapter]) -> Adapter:
    """The adapter whose bands, from the first, these are; deferred where they are.

    Which rows a dense tensor has is known, so a codec's rounding of it does not count.
    """
    layers: dict[str, list[Adapter]] = {}
    for part in bands:
        for name in part:
            layers.setdefault(name, []).append(part)

    def made(name: str) -> Pair:
        pairs = [part[name] for part in layers[name]]
        joint = Pair(np.concatenate([p.a for p in pairs]), np.concatenate([p.b for p in pairs], axis=1))
        return first_rows(joint) if is_dense(name) else joint

    if not any(isinstance(part.layers, Deferred) for part in bands):
        return Adapter({name: made(name) for name in layers})
    sizes = {
        name: (*parts[0].shape_of(name), sum(part.rank_of(name) for part in parts)) for name, parts in layers.items()
    }
    return Adapter(Deferred(sizes, made))


def assembled(found: Iterable[tuple[Band, Adapter]]) -> Adapter:
    """The adapter whose bands these are, from the first, in order; a factor of which no band is here is zero."""
    ranges: dict[int, Adapter] = {}
    for where, part in found:
        ranges[where.start] = _together(ranges[where.start], part) if where.start in ranges else part
    return join(list(ranges.values()))


def _together(one: Adapter, other: Adapter) -> Adapter:
    """Two halves of a band: each has zeros where the other has a factor."""

    def made(name: str) -> Pair:
        return Pair(one[name].a + other[name].a, one[name].b + other[name].b)

    if isinstance(one.layers, Deferred) or isinstance(other.layers, Deferred):
        return Adapter(Deferred(one.sizes, made))
    return Adapter({name: made(name) for name in one})
