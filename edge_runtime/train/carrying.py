"""The optimiser's memory of one round as the beginning of the next, on a global adapter that was factorised anew.

Between two rounds the server merges and re-factorises: the device gets back nearly the product that it knew, in other
rows. `lora.rotation` finds the rotation between the two factorisations, and the moments follow it. The factors
themselves stay as they were received: rotating the moments by R has the same effect as rotating the factors by Rᵀ and
back, up to AdamW's element-wise division, and the update that is sent stays a difference against what the server knows
it sent. So no rotation ever travels.

A fleet must ask for it (`training.carry_moments`). On a small model (64 wide, rank 4, 1 or 4 devices, 5 rounds of 4 or
12 steps, 3 seeds) it was not better than beginning without moments: the same within noise at 12 steps and a moderate
learning rate, slower at 4 steps or a large one: the bias-corrected first steps of a fresh Adam are its boldest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from edge_runtime.lora.adapter import Matrix, Pair
from edge_runtime.lora.rotation import Square, align, follow, rotate_row_squares, rotate_rows
from edge_runtime.train import optimizer
from edge_runtime.train.optimizer import Array, Entries, Moments
from edge_runtime.train.resume import RoundState

LEAST_COSINE = 0.7
"""Below it the new factors are too little explained by the old ones for gradients of those to say much of these."""


class Carried(NamedTuple):
    """The beginning of a round.

    Attributes:
        start: no steps, the parameters of now, and moments for those layers that could be aligned.
        kept: layers whose moments were carried over.
        layers: layers that the round trains.
    """

    start: RoundState
    kept: int
    layers: int


def carried(last: RoundState, parameters: Mapping[str, Matrix], name: str) -> Carried:
    """The moments of the last round, rotated onto the factors that the next one begins with.

    A layer begins without moments where its shape or rank is another than before, or where the two factorisations lie
    too far apart. The count of steps is carried too: it is what the moments were averaged over, and Adam's bias
    correction for a mean over many steps must not be that of a first step.

    Args:
        last: the end of the last round.
        parameters: those the next round begins with, by the same names: `<layer>.a` (r, d_in), `<layer>.b` (d_out, r).
        name: of the optimiser of both rounds, in `optimizer.OPTIMIZERS`.
    """
    choice = optimizer.get(name)
    layers = sorted(found[: -len(".a")] for found in parameters if found.endswith(".a"))
    moments: dict[str, dict[str, Array]] = {}
    for layer in layers:
        a, b = f"{layer}.a", f"{layer}.b"
        rotation = _rotation(last, parameters, a, b)
        if rotation is not None and a in last.moments and b in last.moments:
            of_a, of_b = choice.read(last.moments[a]), choice.read(last.moments[b])
            moments[a] = _plain(choice.write(_rotated(rotation, of_a)))
            moments[b] = _plain(choice.write(_transposed(_rotated(rotation, _transposed(of_b)))))
    start = RoundState((), dict(parameters), _sharing(moments), 0)
    return Carried(start, len(moments) // 2, len(layers))


def _rotation(last: RoundState, parameters: Mapping[str, Matrix], a: str, b: str) -> Square | None:
    if any(name not in last.parameters or last.parameters[name].shape != parameters[name].shape for name in (a, b)):
        return None
    now, before = Pair(parameters[a], parameters[b]), Pair(last.parameters[a], last.parameters[b])
    # A slice that moved by some of its directions: those begin without a memory, and the others keep theirs.
    return follow(now, before) if align(now, before).cosine >= LEAST_COSINE else None


def _rotated(rotation: Square, moments: Moments) -> Moments:
    first, second = rotate_rows(rotation, moments.first), rotate_row_squares(rotation, moments.second)
    return Moments(first, second, moments.steps)


def _transposed(moments: Moments) -> Moments:
    return Moments(moments.first.T.copy(), moments.second.T.copy(), moments.steps)


def _plain(entries: Entries) -> dict[str, Array]:
    return dict(entries)


def _sharing(moments: dict[str, dict[str, Array]]) -> dict[str, dict[str, Array]]:
    """The same, with equal tables of codes as one array each."""
    tables: dict[bytes, Array] = {}
    for held in moments.values():
        for entry in held:
            if entry.startswith("qmap"):
                held[entry] = tables.setdefault(held[entry].tobytes(), held[entry])
    return moments
