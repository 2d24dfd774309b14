"""The leading directions of a wide sum by a randomised range finder, which sees the sum through its factors alone.

    Y = W Ω,  Q = orth(Y),  then Z = Wᵀ Q,  Q = orth(W orth(Z)), …   and at the end  W ≈ Q Zᵀ

Each half of a step costs two products with the factors, O((d_out + d_in) R k), and one thin QR of k columns, and is a
result by itself: W projected on the range that was found last, of columns or of rows. What a result lacks is known
from probes: Gaussian vectors of which the range finder knows nothing. It stops when what more halves could gain,
extrapolated from what the last one gained, is below the requested excess over the optimum.

Source: N. Halko, P. G. Martinsson, J. A. Tropp, "Finding structure with randomness", SIAM Review 53 (2011): the
randomised subspace iteration with re-orthonormalisation (algorithm 4.4). Differs from it: W is a sum of products that
is never formed, the number of steps is decided by what they gain, and the error is bounded through chi-squared, which
is tighter than the a posteriori bound given there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.lora.algebra import Spectrum, Wide, draw_from, signed, svd
from edge_runtime.lora.columns import Columns, backward, forward, magnitude
from edge_runtime.lora.orthonormal import orthonormal

PROBES = 32
SHARE = 0.2
"""Of the squared norm that PROBES Gaussian probes show on average, they show less than this once in a million times,
whatever the spectrum: the lower tail of a chi-squared variable of 32 degrees of freedom, the widest there is."""
MOST_STEPS = 12
SLOWEST = 0.95
"""Largest ratio of two gains from which the rest is extrapolated."""
CAUTION = 2.0
"""What is to come is taken for so many times what the series say: the ratios are estimates too."""
SINGLE, DOUBLE = float(np.finfo(np.float32).eps), float(np.finfo(np.float64).eps)
CANCELLING = 16.0
"""Where the terms are so many times larger than their sum, float32 would leave fewer than five digits of it."""
FAINT = 3e-3
"""Where the error is so little of the norm, float64 is used: in float32 the gain of a step would drown in rounding."""
NOTHING = 1e-9
"""An error of so little of the norm is none, in float64: nothing can be gained any more."""


@dataclass(frozen=True, eq=False)
class Sketch:
    """What a range finder found.

    Attributes:
        spectrum: the directions found.
        missed: (d_out, PROBES), the probes times what the directions lack.
        lacking: Frobenius norm of what the directions lack, as the probes show it.
        bound: what that is less than, but for once in a million times.
        rounding: how far the products may have been rounded.
        steps: power iterations taken.
        excess: estimated, relative, of the error of a cut to the rank asked for over the optimum.
        precision: of the products.
    """

    spectrum: Spectrum
    missed: Wide
    lacking: float
    bound: float
    rounding: float
    steps: int
    excess: float
    precision: type[np.floating]


@dataclass(frozen=True, eq=False)
class _Half:
    """W ≈ q core zᵀ after half a step, and the squared singular values of this core and of those before, falling."""

    q: Wide
    core: Wide
    z: Wide
    squares: tuple[NDArray[np.float64], ...]


@dataclass(frozen=True, eq=False)
class _Judged:
    """What half a step is worth.

    Attributes:
        missed: (d_out, PROBES), the probes times what it lacks.
        lacking: norm of what it lacks.
        norm: of W.
        error: norm of what a cut to the rank lacks.
        excess: of that over the optimum, estimated.
        steps: power iterations so far.
    """

    missed: Wide
    lacking: float
    norm: float
    error: float
    excess: float
    steps: int


def probes_from(seed: str, d_in: int) -> Wide:
    """Probes for several sketches, so that what each of them misses adds up; (d_in, PROBES)."""
    return draw_from(f"{seed}:probes", (d_in, PROBES))


def sketch(
    parts: Sequence[Columns], rank: int, width: int, *, excess: float, seed: str, probes: Wide | None = None
) -> Sketch:
    """Find the range of the sum of all parts.

    Args:
        parts: of one shape.
        rank: the excess is judged for a cut to this rank.
        width: directions searched for, oversampling included.
        excess: relative, of the error in Frobenius norm; steps go on until it is reached, or MOST_STEPS are done.
        seed: names the random draws.
        probes: (d_in, PROBES), of which nothing of the sum depends; some of its own when None.

    Raises:
        ValueError: a width of no directions, or of more than the layer has.
    """
    d_out, d_in = parts[0].shape
    if not 0 < width <= min(d_out, d_in):
        raise ValueError(f"a range has 1 to {min(d_out, d_in)} directions; found {width}")
    probes = probes_from(seed, d_in) if probes is None else probes
    image = forward(parts, np.concatenate([draw_from(seed, (d_in, width)), probes], axis=1), np.float32)
    size = magnitude(parts)
    start, _ = orthonormal(image[:, :width])
    half, found = _search(_halves(parts, start, np.float32), (probes, image[:, width:]), rank, excess, FAINT)
    if size <= CANCELLING * found.norm and found.error >= FAINT * found.norm:
        return _told(half, found, 4 * SINGLE * size, np.float32)
    # What float32 found is a good start all the same.
    shown = forward(parts, probes, np.float64)
    half, found = _search(_halves(parts, half.q, np.float64), (probes, shown), rank, excess, NOTHING)
    return _told(half, found, 16 * DOUBLE * size, np.float64)


def _search(
    halves: Iterator[_Half], shown: tuple[Wide, Wide], rank: int, excess: float, faint: float
) -> tuple[_Half, _Judged]:
    """Go on until half a step is good enough, or the last that is allowed."""
    while True:
        half = next(halves)
        found = _judged(half, shown, rank, faint)
        if found.excess <= excess or found.steps == MOST_STEPS:
            return half, found


def _halves(parts: Sequence[Columns], q: Wide, precision: type[np.floating]) -> Iterator[_Half]:
    """Power iterations, each orthonormalised on both sides."""
    # Products in float32 are not known better than such a basis.
    basis = orthonormal if precision is np.float32 else np.linalg.qr
    squares: tuple[NDArray[np.float64], ...] = ()
    while True:
        z, r = basis(backward(parts, q, precision))
        squares = (*squares, _squares(r))
        yield _Half(q, r.T, z, squares)
        q, r = basis(forward(parts, z, precision))
        squares = (*squares, _squares(r))
        yield _Half(q, r, z, squares)


def _squares(r: Wide) -> NDArray[np.float64]:
    return np.asarray(np.maximum(np.linalg.eigvalsh(r @ r.T)[::-1], 0.0))


def _judged(half: _Half, shown: tuple[Wide, Wide], rank: int, faint: float) -> _Judged:
    """What half a step is worth.

    Args:
        half: of a step.
        shown: probes (d_in, PROBES), and W times these (d_out, PROBES).
        rank: of the cut.
        faint: an error of this share of the norm has no excess that could be told.
    """
    probes, image = shown
    missed = image - half.q @ (half.core @ (half.z.T @ probes))
    lacking = float(np.linalg.norm(missed)) / math.sqrt(PROBES)
    whole, leading = float(np.sum(half.core**2)) + lacking**2, float(np.sum(half.squares[-1][:rank]))
    error = max(whole - leading, 0.0)
    excess = _excess(half.squares, rank, error) if error > faint**2 * whole else 0.0
    return _Judged(missed, lacking, math.sqrt(whole), math.sqrt(error), excess, len(half.squares) // 2)


def _excess(squares: Sequence[NDArray[np.float64]], rank: int, error: float) -> float:
    """Relative excess of an error over the optimum, from what each leading direction gained by the last half step.

    What direction i still lacks shrinks with each half step by the ratio of the squared singular values just beyond the
    range and at i, so its gains are a geometric series.

    Args:
        squares: squared singular values after each half step, falling.
        rank: directions that lead.
        error: squared norm of what they lack, not 0.
    """
    if len(squares) < 2:
        return math.inf
    before, last = squares[-2][:rank], squares[-1][:rank]
    ratios = np.minimum(squares[-1][-1] / np.maximum(last, np.finfo(np.float64).tiny), SLOWEST)
    to_come = CAUTION * float(np.sum(np.maximum(last - before, 0.0) * ratios / (1 - ratios)))
    return 1 / math.sqrt(1 - to_come / error) - 1 if to_come < error else math.inf


def _told(half: _Half, found: _Judged, rounding: float, precision: type[np.floating]) -> Sketch:
    u, s, vt = svd(half.core)
    spectrum = signed(Spectrum(half.q @ u, s, vt @ half.z.T))
    bound = found.lacking / math.sqrt(SHARE)
    return Sketch(spectrum, found.missed, found.lacking, bound, rounding, found.steps, found.excess, precision)
