"""What every codec promises. A codec sees a factor as its directions: (r, n) float32, one row for each rank.

Its parts are flat arrays whose lengths follow from r and n alone. So a size can be told without packing anything, and
a receiver knows what must be there before it looks: nothing in a blob decides how much memory it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.lora.adapter import Matrix

Parts = Mapping[str, NDArray[np.generic]]
"""Arrays by name; the main one is named ""."""


class Part(NamedTuple):
    """What one array of a packed factor must be."""

    dtype: type[np.generic]
    numbers: int


class Codec(NamedTuple):
    """How directions are packed.

    Attributes:
        pack: (r, n) → parts.
        unpack: (parts as `parts` describes them, r, n) → (r, n) float32.
        parts: (r, n) → what the parts are, by name.
        bits: of one number before zstd, about; for people, and to order the table.
    """

    pack: Callable[[Matrix], Parts]
    unpack: Callable[[Parts, int, int], Matrix]
    parts: Callable[[int, int], Mapping[str, Part]]
    bits: float


def size(codec: Codec, rank: int, width: int) -> int:
    """Bytes before zstd of `rank` directions of `width` numbers."""
    return sum(np.dtype(part.dtype).itemsize * part.numbers for part in codec.parts(rank, width).values())


def to_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The nearest bfloat16, ties to even, as its sixteen bits: numpy has no such type."""
    bits = x.view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return rounded


def bf16_above(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The smallest bfloat16 that is not below x, for x >= 0: a scale rounded so clips nothing."""
    bits: NDArray[np.uint16] = ((x.view(np.uint32) + np.uint32(0xFFFF)) >> 16).astype(np.uint16)
    return bits


def from_bf16(bits: NDArray[np.generic]) -> NDArray[np.float32]:
    """The float32 of the same value."""
    wide: NDArray[np.float32] = (bits.astype(np.uint32) << 16).view(np.float32)
    return wide


def scale_of(stored: NDArray[np.generic]) -> NDArray[np.float32]:
    """Scales as they were stored: sixteen bits of bfloat16, or float32."""
    return from_bf16(stored) if stored.dtype == np.uint16 else stored.astype(np.float32)


def inverse(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / scale, and 0 where the scale is 0 or so small that its inverse is no number."""
    with np.errstate(divide="ignore", over="ignore"):
        found = np.float32(1) / scale
    found[~np.isfinite(found)] = 0
    return found
