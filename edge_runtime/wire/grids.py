"""Codecs on even grids: each direction has a step of its own, and numbers become whole counts of it.

An odd number of levels, symmetric about zero, so that zero is exact. As many symbols as fit share one byte, as digits:
two of 15 levels, two of 7, three of 5, five of 3. zstd then codes the bytes by how often they occur, which comes close
to the entropy of the symbols although none of its codes is shorter than one bit.

Two rules for the step. `peak` lets the largest number of the direction be the last level: nothing is clipped, and
packing what was unpacked changes nothing. With few levels that wastes most of them on numbers that hardly occur;
`spread` takes a fixed multiple of the root mean square and clips the rest, which error feedback sends later.

With three levels a number above a threshold is sent as its sign (ternary weight networks, arXiv 1605.04711, with
another threshold), with two every number is. The scale that leaves the least squared error would make each update
shorter than it is, and the rest would come a round later. The scale here makes it as long along itself as what it
stands for, so that what is lost is noise across it (Vargaftik et al., "DRIVE: One-bit Distributed Mean Estimation",
NeurIPS 2021). On a fleet that learns, this took the higher loss of one bit a number from 3.8 % to 0.4 %.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edge_runtime.lora.adapter import Matrix
from edge_runtime.wire.coding import Codec, Part, Parts, bf16_above, from_bf16, inverse, scale_of, to_bf16

SMALLEST_SQUARE = 1e-30
MOST = 1.7
"""Times the mean size. Normal numbers need pi / 2. Beyond that, where a few numbers are large, a longer step would add
more error than there is to send, and error feedback would amplify itself; so the error stays below the numbers."""

Symbols = NDArray[np.uint8]
Scales = NDArray[np.generic]
"""A step for each direction, (r,): sixteen bits of bfloat16, or float32."""


def largest(x: Matrix) -> NDArray[np.float32]:
    """(r,) the largest size of a number in each direction."""
    return np.asarray(np.maximum(x.max(axis=1, initial=0.0), -x.min(axis=1, initial=0.0)), np.float32)


def digits(levels: int) -> int:
    """How many symbols of so many levels share one byte."""
    count = 1
    while levels ** (count + 1) <= 256:
        count += 1
    return count


def join_digits(symbols: Symbols, levels: int) -> Symbols:
    """Symbols below `levels`, as bytes: byte i holds one symbol of each of `digits` consecutive stretches.

    Stretches and not neighbours, so that every pass runs over contiguous memory. Missing symbols count as 0.
    """
    count = digits(levels)
    length = -(-symbols.size // count)
    if count == 1:
        return symbols
    padded = np.zeros(count * length, np.uint8)
    padded[: symbols.size] = symbols
    joined = padded[:length].copy()
    for index in range(1, count):
        joined *= np.uint8(levels)
        joined += padded[index * length : (index + 1) * length]
    return joined


def split_digits(
    joined: NDArray[np.generic], levels: int, values: NDArray[np.float32], size: int
) -> NDArray[np.float32]:
    """The first `size` symbols of joined bytes, each looked up among the `levels` values.

    Bytes that `join_digits` never writes count as their remainder.
    """
    count = digits(levels)
    found = np.empty(count * joined.size, np.float32)
    every, places = np.arange(256), np.asarray(joined)
    for index in range(count):
        table = np.asarray(values[every // levels ** (count - 1 - index) % levels], np.float32)
        np.take(table, places, out=found[index * joined.size : (index + 1) * joined.size], mode="clip")
    return found[:size]


def fine(top: int) -> bool:
    """Whether so many counts need a step in float32: a bfloat16 above it is up to 1/128 too large, which is one."""
    return top >= 64


def _peak(x: Matrix, top: int) -> Scales:
    step = largest(x) / np.float32(top)
    return step if fine(top) else bf16_above(step)


def _spread(x: Matrix, _top: int, multiple: float) -> Scales:
    return to_bf16(np.float32(multiple) * _root_mean_square(x))


def _root_mean_square(x: Matrix) -> NDArray[np.float32]:
    squares = np.einsum("ij,ij->i", x, x)
    if not np.all((squares > SMALLEST_SQUARE) & (squares < 1 / SMALLEST_SQUARE)):
        # Squares of tiny numbers are zero, of huge ones infinite.
        peak = largest(x)
        unit = x * inverse(peak)[:, None]
        return np.asarray(peak * np.sqrt(np.einsum("ij,ij->i", unit, unit) / x.shape[1]), np.float32)
    return np.asarray(np.sqrt(squares / x.shape[1]), np.float32)


def _pack(x: Matrix, levels: int, rule: Callable[[Matrix, int], Scales]) -> Parts:
    top = levels // 2
    scale = rule(x, top)
    counts = x * inverse(scale_of(scale))[:, None]
    np.clip(counts, -top, top, out=counts)
    counts += np.float32(top + 0.5)  # what is cut off behind the point is rounded then
    return {"": join_digits(counts.astype(np.uint8).reshape(-1), levels), "scale": scale}


def _pack_ternary(x: Matrix, threshold: float) -> Parts:
    least = np.float32(threshold) * _root_mean_square(x)
    up, down = x > least[:, None], x < -least[:, None]
    symbols = up.view(np.uint8) - down.view(np.uint8)  # -1 wraps around, and comes back with the 1
    symbols += np.uint8(1)
    return {"": join_digits(symbols.reshape(-1), 3), "scale": _unshrunk(x, symbols.astype(np.float32) - 1)}


def _unpack(parts: Parts, rank: int, width: int, levels: int) -> Matrix:
    values = np.arange(levels, dtype=np.float32) - np.float32(levels // 2)
    counts = split_digits(parts[""], levels, values, rank * width).reshape(rank, width)
    counts *= scale_of(parts["scale"])[:, None]
    return counts


def _parts(rank: int, width: int, levels: int) -> Mapping[str, Part]:
    return {
        "": Part(np.uint8, -(-rank * width // digits(levels))),
        "scale": Part(np.float32 if fine(levels // 2) else np.uint16, rank),
    }


def _grid(levels: int, rule: Callable[[Matrix, int], Scales]) -> Codec:
    return Codec(
        partial(_pack, levels=levels, rule=rule),
        partial(_unpack, levels=levels),
        partial(_parts, levels=levels),
        8 / digits(levels),
    )


def _unshrunk(x: Matrix, signs: Matrix) -> NDArray[np.uint16]:
    """The scale with which scale * signs reaches as far along x as x itself, within `MOST` times the mean size sent."""
    # The peak as unit: sums of huge numbers are infinite.
    unit = x * inverse(peak := largest(x))[:, None]
    along, number = np.einsum("ij,ij->i", unit, signs), np.einsum("ij,ij->i", signs, signs)
    whole = np.einsum("ij,ij->i", unit, unit) * inverse(along)
    return to_bf16(np.asarray(peak * np.minimum(whole, MOST * along * inverse(number)), np.float32))


def _pack_signs(x: Matrix) -> Parts:
    up = x >= 0
    return {"": np.packbits(up), "scale": _unshrunk(x, 2 * up.astype(np.float32) - 1)}


def _unpack_signs(parts: Parts, rank: int, width: int) -> Matrix:
    up = np.unpackbits(np.asarray(parts[""], np.uint8), count=rank * width).reshape(rank, width)
    found = up.astype(np.float32)
    found *= np.float32(2)
    found -= np.float32(1)
    found *= from_bf16(parts["scale"])[:, None]
    return found


SIGNS = Codec(
    _pack_signs,
    _unpack_signs,
    lambda rank, width: {"": Part(np.uint8, -(-rank * width // 8)), "scale": Part(np.uint16, rank)},
    1,
)
"""Nothing but the signs, and a scale for each direction.

Source: Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes" (ICML 2019)."""


def ternary(threshold: float) -> Codec:
    """Signs of the numbers above `threshold` times the direction's root mean square."""
    return Codec(
        partial(_pack_ternary, threshold=threshold),
        partial(_unpack, levels=3),
        partial(_parts, levels=3),
        8 / digits(3),
    )


def peak(levels: int) -> Codec:
    """An even grid whose last level is the direction's largest number."""
    return _grid(levels, _peak)


def spread(levels: int, multiple: float) -> Codec:
    """An even grid whose step is `multiple` times the direction's root mean square."""
    return _grid(levels, partial(_spread, multiple=multiple))
