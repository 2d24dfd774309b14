"""One factor of a pair without the other: what a round leaves as it is, or a device keeps for itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from edge_runtime.lora.adapter import Adapter, Deferred, Pair

Factors = Literal["ab", "a", "b"]
"""Both factors, or one of them."""
Private = Literal["", "a", "b"]
"""The factor that a device keeps for itself; none where it is empty."""


def only(adapter: Adapter, factors: Factors) -> Adapter:
    """The adapter with zeros in the factor that is not named; as it is for "ab"."""
    if factors == "ab":
        return adapter

    def made(name: str) -> Pair:
        pair = adapter[name]
        return Pair(pair.a, np.zeros_like(pair.b)) if factors == "a" else Pair(np.zeros_like(pair.a), pair.b)

    return Adapter(
        Deferred(adapter.sizes, made) if isinstance(adapter.layers, Deferred) else {n: made(n) for n in adapter}
    )


def exchanged(adapter: Adapter, own: Adapter, factor: Private) -> Adapter:
    """The adapter with one factor, "a" or "b", of another one, in the layers where that is there and fits."""
    found = dict(adapter)
    for name, pair in own.items():
        if name in found and found[name].shape == pair.shape and found[name].rank == pair.rank:
            found[name] = Pair(pair.a, found[name].b) if factor == "a" else Pair(found[name].a, pair.b)
    return Adapter(found)


def numbers_in(sizes: Mapping[str, tuple[int, int, int]], factors: Factors) -> int:
    """Numbers of the named factors of layers of these (d_out, d_in, rank)."""
    return sum(rank * (("a" in factors) * d_in + ("b" in factors) * d_out) for d_out, d_in, rank in sizes.values())
