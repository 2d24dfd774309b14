"""Which ranks a device goes on with, where its fleet has it prune them: HetLoRA's rule, pure.

A layer of r directions has a tail, those beyond floor(kept r). If ||B_t|| ||A_t|| shrank over a round, the device goes
on without the tail: the layer has room to spare.

Source: Cho et al., EMNLP 2024, arXiv 2401.06432. Differs from it: each layer is judged by itself, and keeps one
direction in any case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import cut, pad


def stays(rank: int, kept: float) -> int:
    """Directions of a layer that are no tail."""
    return max(1, math.floor(kept * rank))


def pruned(before: Adapter, after: Adapter, kept: float) -> dict[str, int]:
    """Layer → the rank to go on with.

    Args:
        before: the slice that a round trained, before it.
        after: the same after it; same layers, shapes and ranks.
        kept: share of its directions that a layer keeps where it is pruned.
    """
    found = {}
    for name, pair in after.items():
        start = stays(pair.rank, kept)
        shrank = start < pair.rank and _size(pair, start) < _size(before[name], start)
        found[name] = start if shrank else pair.rank
    return found


def narrowed(received: Adapter, ranks: Mapping[str, int]) -> Adapter:
    """What a device that was pruned sees: the first directions of each named layer, and zeros beyond them."""
    return Adapter(
        {
            name: pad(cut(pair, ranks[name]), pair.rank) if ranks.get(name, pair.rank) < pair.rank else pair
            for name, pair in received.items()
        }
    )


def _size(pair: Pair, start: int) -> float:
    return float(np.linalg.norm(pair.b[:, start:]) * np.linalg.norm(pair.a[start:]))
