"""Top-k: the largest numbers of each direction, and which they are.

The places are a bitmap: one bit a number, which zstd shrinks to about the entropy of the choice, so that the size
before zstd does not depend on the numbers. The values are int8 with one scale for each direction.

Source: Aji and Heafield, "Sparse communication for distributed gradient descent" (EMNLP 2017). Made for error feedback:
without it, what is small in every round never arrives.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from edge_runtime.lora.adapter import Matrix
from edge_runtime.wire.coding import Codec, Part, Parts, inverse
from edge_runtime.wire.grids import largest

TOP = 127


def kept(width: int, one_in: int) -> int:
    """How many numbers of a direction are sent."""
    return -(-width // one_in)


def _pack(x: Matrix, one_in: int) -> Parts:
    size, k = np.abs(x), kept(x.shape[1], one_in)
    least = np.partition(size, x.shape[1] - k, axis=1)[:, x.shape[1] - k, None]
    chosen = size > least
    # Of those that are just as large, the first: the same numbers give the same bytes on every machine.
    room, equal = k - np.count_nonzero(chosen, axis=1), size == least
    tied = np.flatnonzero(np.count_nonzero(equal, axis=1) > room)
    equal[tied] &= np.cumsum(equal[tied], axis=1) <= room[tied, None]
    chosen |= equal
    scale = largest(x) / np.float32(TOP)
    counts = np.rint(x * inverse(scale)[:, None])[chosen]
    return {"": counts.astype(np.int8), "scale": scale, "where": np.packbits(chosen)}


def _unpack(parts: Parts, rank: int, width: int) -> Matrix:
    chosen = np.unpackbits(parts["where"].astype(np.uint8), count=rank * width).astype(bool)
    if np.count_nonzero(chosen) != parts[""].size:
        raise ValueError(f"top-k has {parts[''].size} values for {np.count_nonzero(chosen)} places")
    found = np.zeros(rank * width, np.float32)
    found[chosen] = parts[""]
    return found.reshape(rank, width) * parts["scale"].astype(np.float32)[:, None]


def _parts(rank: int, width: int, one_in: int) -> Mapping[str, Part]:
    numbers = rank * width
    return {
        "": Part(np.int8, rank * kept(width, one_in)),
        "scale": Part(np.float32, rank),
        "where": Part(np.uint8, -(-numbers // 8)),
    }


def top(one_in: int) -> Codec:
    """The largest number of each `one_in`, in each direction."""
    return Codec(
        partial(_pack, one_in=one_in), _unpack,
        partial(_parts, one_in=one_in), 1 + 8 / one_in,
    )  # fmt: skip
