"""Numbers that a text names: the same on every machine and with every library, and the first ones of any longer draw.

Devices and server must agree on a mask or on where a tensor begins without sending it, so this rests on SHAKE-256 (FIPS
202) alone, whose longer outputs begin with the shorter ones, and not on a library's generator.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from edge_runtime.lora.adapter import Matrix


def words(text: str, count: int) -> NDArray[np.uint64]:
    """(count,), evenly distributed over all 64-bit numbers."""
    return np.frombuffer(hashlib.shake_256(text.encode()).digest(8 * count), "<u8").astype(np.uint64)


def uniform(text: str, count: int, bound: float) -> Matrix:
    """(count,) float32, evenly distributed over -bound … bound."""
    shares = words(text, count) / 2.0**64
    return ((2.0 * shares - 1.0) * bound).astype(np.float32)


def places(text: str, count: int, of: int) -> NDArray[np.int64]:
    """(count,) different numbers below `of`, in the order drawn.

    Raises:
        ValueError: more than half of all; the last ones would take too long to find.
    """
    if count > of // 2:
        raise ValueError(f"a mask has at most half of the {of} entries; found {count}")
    drawn, found = 2 * count + 64, np.zeros(0, np.int64)
    while found.size < count:
        numbers = (words(text, drawn) % np.uint64(of)).astype(np.int64)
        found = numbers[np.sort(np.unique(numbers, return_index=True)[1])]
        drawn *= 2
    return found[:count]


START = 0.1
"""Rows of virtual tokens begin evenly distributed over -START … START, drawn from their layer's name: small, and unlike
each other."""


def virtual_rows(name: str, rows: int, width: int) -> Matrix:
    """(rows, width) float32: where the rows of the virtual tokens of that layer begin, on every device."""
    return np.stack([uniform(f"virtual:{name}:{row}", width, START) for row in range(rows)])
