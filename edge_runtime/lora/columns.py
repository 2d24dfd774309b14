"""Directions side by side: a weighted sum of products as an operator, which multiplies and is never formed.

    W = sum_i w_i b_i a_i,   W x = B (w * (A x))

Both factors lie direction by direction, so that what arrives is appended without moving what is there, and one product
of a block serves all of its directions at once. Weights stay apart from the factors: scaled factors would be rounded,
and of two terms that cancel nothing but that rounding would be left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.lora.adapter import Pair
from edge_runtime.lora.algebra import Spectrum, Wide

Floats = NDArray[np.float32] | NDArray[np.float64]
Weight = float | NDArray[np.float64]
Term = tuple[Weight, Pair]
"""A weight, or one for each direction, and a pair."""

BLOCK = 512
"""Directions that are converted at a time where factors must be wider than they are stored."""


REMEMBERED = 8
"""Pairs among whose directions others are looked for; they stay in memory meanwhile."""


@dataclass(frozen=True, eq=False)
class Columns:
    """A weighted sum of R rank-one products.

    Attributes:
        b: (R, d_out), a direction of `b` in each row; float32 or float64.
        a: (R, d_in), likewise.
        w: (R,) weights, of any sign, float64.
    """

    b: Floats
    a: Floats
    w: NDArray[np.float64]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the sum."""
        return int(self.b.shape[1]), int(self.a.shape[1])

    @property
    def count(self) -> int:
        """R, the number of directions."""
        return int(self.w.size)


def of_spectrum(spectrum: Spectrum, count: int) -> Columns:
    """The first directions of a spectrum, in float64."""
    return Columns(spectrum.u[:, :count].T, spectrum.vt[:count], spectrum.s[:count])


def chunks(terms: Iterable[Term], capacity: int) -> Iterator[Columns]:
    """The terms as columns of at most `capacity` directions each; a chunk is good until the next one is taken.

    All of them lie in the same memory: to have the system hand out new pages costs as much as to fill them.

    Raises:
        ValueError: terms of different shapes.
    """
    room: Columns | None = None
    used = 0
    for weight, pair in terms:
        room = room or _room(pair.shape, capacity)
        if pair.shape != room.shape:
            raise ValueError(f"cannot add products of shapes {room.shape} and {pair.shape}")
        start = 0
        while start < pair.rank:
            if used == capacity:
                yield room
                used = 0
            stop = min(pair.rank, start + capacity - used)
            at, taken = slice(used, used + stop - start), slice(start, stop)
            room.b[at], room.a[at] = pair.b[:, taken].T, pair.a[taken]
            room.w[at] = weight if isinstance(weight, float) else weight[taken]
            used, start = at.stop, stop
    if room is not None:
        yield Columns(room.b[:used], room.a[:used], room.w[:used])


def distinct(terms: Iterable[tuple[float, Pair]]) -> Term | None:
    """One term for all, in which directions that are equal to the last bit are one, with the sum of their weights.

    Slices of one version share their directions, so of a thousand slices no more than that version is left. Directions
    that contribute nothing are left out; None if none does.
    """
    places: dict[tuple[bytes, bytes], int] = {}
    read: deque[tuple[Pair, NDArray[np.intp]]] = deque(maxlen=REMEMBERED)
    weights = np.zeros(0)
    for weight, pair in terms:
        # Most slices are the first directions of one array: where that can be seen, they need not be read again.
        at = next((known for whole, known in read if _begins(pair, whole)), None)
        if at is None:
            at = np.asarray([places.setdefault(key, len(places)) for key in _keys(pair)], np.intp)
            weights = np.concatenate([weights, np.zeros(len(places) - weights.size)])
            read.append((pair, at))
        np.add.at(weights, at[: pair.rank], weight)
    left = [(weight, key) for weight, key in zip(weights.tolist(), places, strict=True) if weight and all(key)]
    if not left:
        return None
    b, a = (np.stack([np.frombuffer(key[side], np.float32) for _, key in left]) for side in (0, 1))
    return np.asarray([weight for weight, _ in left]), Pair(a, np.ascontiguousarray(b.T))


def _keys(pair: Pair) -> list[tuple[bytes, bytes]]:
    """Each direction as its bytes; all that contribute nothing have the same, which are none."""
    rows = np.ascontiguousarray(pair.b.T)
    return [
        (b.tobytes(), a.tobytes()) if b.any() and a.any() else (b"", b"") for b, a in zip(rows, pair.a, strict=True)
    ]


def _begins(pair: Pair, whole: Pair) -> bool:
    """Whether a pair is the first directions of another one in memory, and not only equal to them."""
    return pair.rank <= whole.rank and all(
        one.ctypes.data == two.ctypes.data and one.strides == two.strides
        for one, two in ((pair.a, whole.a), (pair.b, whole.b))
    )


def _room(shape: tuple[int, int], capacity: int) -> Columns:
    d_out, d_in = shape
    return Columns(np.empty((capacity, d_out), np.float32), np.empty((capacity, d_in), np.float32), np.empty(capacity))


def forward(parts: Sequence[Columns], x: Wide, precision: type[np.floating]) -> Wide:
    """W x for the sum W of all parts; the products are computed in that precision, the result is float64.

    Args:
        parts: of one shape.
        x: (d_in, k).
        precision: np.float32 or np.float64.

    Returns:
        (d_out, k).
    """
    return _multiplied([(part.a, part.w, part.b) for part in parts], x, precision)


def backward(parts: Sequence[Columns], y: Wide, precision: type[np.floating]) -> Wide:
    """Wᵀ y, as `forward`; y is (d_out, k) and the result (d_in, k)."""
    return _multiplied([(part.b, part.w, part.a) for part in parts], y, precision)


def _multiplied(
    parts: Sequence[tuple[Floats, NDArray[np.float64], Floats]], x: Wide, precision: type[np.floating]
) -> Wide:
    given = x.astype(precision)
    total = np.zeros((parts[0][2].shape[1], x.shape[1]))
    for inner, w, outer in parts:
        step = BLOCK if inner.dtype != precision else max(1, w.size)
        for start in range(0, w.size, step):
            at = slice(start, start + step)
            middle = inner[at].astype(precision, copy=False) @ given
            middle *= w[at, None].astype(precision)
            total += outer[at].astype(precision, copy=False).T @ middle
    return total


def magnitude(parts: Sequence[Columns]) -> float:
    """How large the terms are: the root of the sum of their squared norms. What cancels is still there.

    Rounding errors of the terms are as good as independent, so a sum in float32 is off by about eps times this.
    """
    total = 0.0
    for part in parts:
        b, a = (np.einsum("ij,ij->i", factor, factor).astype(np.float64) for factor in (part.b, part.a))
        total += float(np.sum(part.w**2 * b * a))
    return float(np.sqrt(total))


def squared_norm(parts: Sequence[Columns], precision: type[np.floating]) -> float:
    """‖W‖² through the Gram matrices of the factors, a block at a time: exact to rounding, O((d_out + d_in) R²)."""
    blocks = [
        (part.b[at : at + BLOCK], part.a[at : at + BLOCK], part.w[at : at + BLOCK])
        for part in parts
        for at in range(0, part.count, BLOCK)
    ]
    total = 0.0
    for index, (b, a, w) in enumerate(blocks):
        left, right = b.astype(precision, copy=False), a.astype(precision, copy=False)
        for other, (b_, a_, w_) in enumerate(blocks[index:]):
            grams = left @ b_.astype(precision, copy=False).T, right @ a_.astype(precision, copy=False).T
            part_sum = w @ np.multiply(*grams, dtype=np.float64) @ w_
            total += float(part_sum) if other == 0 else 2 * float(part_sum)
    return total


def stacked(parts: Sequence[Columns]) -> tuple[Wide, Wide]:
    """Factors b (d_out, R) and a (R, d_in) of the sum in float64, the root of each weight on both sides."""
    b = np.concatenate([part.b.T * (np.sign(part.w) * np.sqrt(np.abs(part.w))) for part in parts], axis=1)
    a = np.concatenate([part.a * np.sqrt(np.abs(part.w))[:, None] for part in parts])
    return b, a
