"""`auto`: which codec for which direction of which layer, so that an update fits a number of bytes.

Training moves (a, b) to (a + Δa, b + Δb). An error e in row i of Δa changes the product by b'ᵢ eᵀ, one in column i of
Δb by e a'ᵢᵀ, with the factors as they are after training. So each direction of each factor counts for the square of its
change times the square of its partner, and the squared error of the product is the sum over all of them: exactly where
directions are orthogonal, which they nearly are, for the server hands out singular vectors. In that basis these numbers
are the energies of the change; those of `a` are mostly a few per cent of those of `b`.

A direction that is not sent is a bias, and comes late even with error feedback; one sent coarsely is noise, which the
mean over devices makes small. So first every direction gets its signs, those first that move the product most; what is
left of the budget goes up the ladder int2, int3, int4, int8 by reverse water-filling (Cover and Thomas, "Elements of
Information Theory", 10.3.3): each next byte where it removes most. Only under a budget of less than a bit a number
does a layer lose rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.wire.layout import Layer, Runs

AUTO = "auto"
"""The name under which a fleet asks for it."""

DEFAULT_BITS = 2.0
"""Bits of a number, on average, where no budget is given."""

LADDER: tuple[tuple[str, float, float], ...] = (
    ("none", 0.0, 1.0),
    ("int1", 1.05, 0.29),
    ("int2", 1.65, 0.085),
    ("int3", 2.5, 0.043),
    ("int4", 3.8, 0.006),
    ("int8", 8.0, 0.00002),
)
"""Codec, bits of a number after zstd, and the squared error as a share of the square: as measured on updates of real
training. Each rung removes less for a bit than the one below."""

SCALE_BYTES = 2


def budget_of(parameters: int, limits: tuple[int | None, ...]) -> int:
    """Bytes that an update of so many numbers may have: the smallest limit that is given, or the default."""
    given = [limit for limit in limits if limit is not None]
    return min(given) if given else int(parameters * DEFAULT_BITS / 8)


def weigh(change: Adapter, received: Adapter) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Layer → what each row of Δa and each column of Δb moves of the product: squares, (r,) each.

    The arguments are those of `order`.
    """
    return {name: _weigh(pair, received[name]) for name, pair in change.items()}


def _weigh(by: Pair, before: Pair) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    def squares(factor: NDArray[np.float32], axis: int) -> NDArray[np.float64]:
        return np.asarray(np.einsum("ij,ij->i" if axis else "ij,ij->j", factor, factor), np.float64)

    return squares(by.a, 1) * squares(before.b + by.b, 0), squares(by.b, 0) * squares(before.a + by.a, 1)


@dataclass(frozen=True, eq=False)
class Order:
    """In which order directions climb the ladder.

    Attributes:
        change: what is to be sent.
        climbers: the direction that takes the n-th step; of each layer, first the rows of a, then the columns of b.
        cost: bytes of the first n steps together.
    """

    change: Adapter
    climbers: NDArray[np.intp]
    cost: NDArray[np.float64]


def order(change: Adapter, received: Adapter) -> Order:
    """The steps sorted by what they remove of the products' squared error for each byte, the most first.

    Args:
        change: factor-wise change that is to be sent.
        received: the slice that it changes.
    """
    energy = np.concatenate([*itertools.chain.from_iterable(weigh(change, received).values()), np.zeros(0)])
    widths = np.array([side for pair in change.values() for side in reversed(pair.shape)], np.float64)
    ranks = np.array([pair.rank for pair in change.values()], np.intp)
    width = np.repeat(widths, np.repeat(ranks, 2))
    bits, error = (np.array(column) for column in list(zip(*LADDER, strict=True))[1:])
    cost = width[:, None] * np.diff(bits) / 8
    cost[:, 0] += SCALE_BYTES
    gain = energy[:, None] * -np.diff(error)
    first = np.broadcast_to(np.arange(cost.shape[1]) > 0, cost.shape)
    steps = np.lexsort(((-(gain / cost)).reshape(-1), first.reshape(-1)))
    # A direction that nothing moved stays out whatever the budget.
    steps = steps[gain.reshape(-1)[steps] > 0]
    return Order(change, steps // cost.shape[1], np.cumsum(cost.reshape(-1)[steps]))


def choose(order: Order, budget: float) -> tuple[Layer, ...]:
    """The layout that fits about `budget` bytes after zstd, with the least squared error of the products.

    The same change and budget give the same layout.
    """
    taken = order.climbers[: np.searchsorted(order.cost, budget, side="right")]
    directions = 2 * sum(pair.rank for pair in order.change.values())
    return tuple(_layers(order.change, np.bincount(taken, minlength=directions)))


def _layers(change: Adapter, rungs: NDArray[np.intp]) -> list[Layer]:
    layers, at = [], 0
    for name, pair in change.items():
        a, b = rungs[at : at + pair.rank], rungs[at + pair.rank : at + 2 * pair.rank]
        at += 2 * pair.rank
        layers.append(Layer(name, *pair.shape, _runs(a), _runs(b)))
    return layers


def _runs(rungs: NDArray[np.intp]) -> Runs:
    return tuple((LADDER[rung][0], len(list(run))) for rung, run in itertools.groupby(rungs.tolist()))


def describe(layers: tuple[Layer, ...]) -> str:
    """What was chosen, for people: the share of the numbers that each codec packs."""
    numbers: dict[str, int] = {}
    for layer in layers:
        for runs, width in ((layer.a, layer.d_in), (layer.b, layer.d_out)):
            for codec, count in runs:
                numbers[codec] = numbers.get(codec, 0) + count * width
    total = sum(numbers.values())
    return ", ".join(f"{count / total:.0%} {codec}" for codec, count in _in_order(numbers)) if total else "nothing"


def _in_order(numbers: Mapping[str, int]) -> list[tuple[str, int]]:
    return [(codec, numbers[codec]) for codec, _, _ in reversed(LADDER) if codec in numbers]
