"""The leading directions of a wide sum by a randomised range finder, which sees the sum through its factors alone.

    Y = W Ω,  Q = orth(Y),  then Z = Wᵀ Q,  Q = orth(W orth(Z)), …   and at the end  W ≈ Q Zᵀ

Each step costs two products with the factors, O((d_out + d_in) R k), and one thin QR of k columns on either side. What
the result lacks, W - Q Qᵀ W, is known from probes: Gaussian vectors of which the range finder knows nothing. It stops
when what more steps could gain, extrapolated from what the last ones gained, is below the requested excess over the
optimum.

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

from edge_runtime.lora.algebra import Spectrum, Wide, draw_from, signed
from edge_runtime.lora.columns import Columns, backward, forward, magnitude

PROBES = 32
SHARE = 0.2
"""Of the squared norm that PROBES Gaussian probes show on average, they show less than this once in a million times,
whatever the spectrum: the lower tail of a chi-squared variable of 32 degrees of freedom, the widest there is."""
MOST_STEPS = 12
SLOWEST = 0.95
"""Largest ratio of two gains from which the rest is extrapolated."""
CAUTION = 2.0
"""What is to come is taken for so many times the geometric series: slow directions gain after the fast ones."""
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
        lacking: Frobenius norm of what they lack, as the probes show it.
        bound: what that is less than, but for once in a million times.
        rounding: how far the products may have been rounded.
        steps: power iterations taken.
        excess: estimated, relative, of the error of a cut to the rank asked for over the optimum.
        precision: of the products.
    """

    spectrum: Spectrum
    lacking: float
    bound: float
    rounding: float
    steps: int
    excess: float
    precision: type[np.floating]


@dataclass(frozen=True, eq=False)
class _Step:
    """W ≈ q (z r)ᵀ, and the energies of its leading directions after this half step and each before."""

    q: Wide
    z: Wide
    r: Wide
    energies: tuple[float, ...]


def sketch(parts: Sequence[Columns], rank: int, width: int, *, excess: float, seed: str) -> Sketch:
    """Find the range of the sum of all parts.

    Args:
        parts: of one shape.
        rank: the excess is judged for a cut to this rank.
        width: directions searched for, oversampling included.
        excess: relative, of the error in Frobenius norm; steps go on until it is reached, or MOST_STEPS are done.
        seed: names the random draws.

    Raises:
        ValueError: a width of no directions, or of more than the layer has.
    """
    d_out, d_in = parts[0].shape
    if not 0 < width <= min(d_out, d_in):
        raise ValueError(f"a range has 1 to {min(d_out, d_in)} directions; found {width}")
    draw = draw_from(seed, (d_in, width + PROBES))
    image = forward(parts, draw, np.float32)
    size = magnitude(parts)
    start = np.linalg.qr(image[:, :width])[0]
    step, found = _search(_steps(parts, start, rank, np.float32), image[:, width:], excess, FAINT)
    if size <= CANCELLING * found.norm and found.error >= FAINT * found.norm:
        return _told(step, found, 4 * SINGLE * size, np.float32)
    # What float32 found is a good start all the same.
    shown = forward(parts, draw[:, width:], np.float64)
    step, found = _search(_steps(parts, step.q, rank, np.float64), shown, excess, NOTHING)
    return _told(step, found, 16 * DOUBLE * size, np.float64)


@dataclass(frozen=True)
class _Judged:
    """What a step is worth.

    Attributes:
        lacking: norm of W - q qᵀ W.
        norm: of W.
        error: norm of what a cut to the rank lacks.
        excess: of that over the optimum, estimated.
        steps: power iterations so far.
    """

    lacking: float
    norm: float
    error: float
    excess: float
    steps: int


def _search(steps: Iterator[_Step], shown: Wide, excess: float, faint: float) -> tuple[_Step, _Judged]:
    """Go on until a step is good enough, or the last that is allowed."""
    while True:
        step = next(steps)
        found = _judged(step, shown, faint)
        if found.excess <= excess or found.steps == MOST_STEPS:
            return step, found


def _steps(parts: Sequence[Columns], q: Wide, rank: int, precision: type[np.floating]) -> Iterator[_Step]:
    """Power iterations, each orthonormalised on both sides."""
    energies: list[float] = []
    while True:
        z, r = np.linalg.qr(backward(parts, q, precision))
        energies.append(_energy(r, rank))
        yield _Step(q, z, r, tuple(energies))
        q, back = np.linalg.qr(forward(parts, z, precision))
        energies.append(_energy(back, rank))


def _energy(r: Wide, rank: int) -> float:
    """Sum of the squares of the leading singular values."""
    return float(np.sum(np.linalg.eigvalsh(r @ r.T)[-rank:])) if rank else 0.0


def _judged(step: _Step, shown: Wide, faint: float) -> _Judged:
    """What a step is worth.

    Args:
        step: the step.
        shown: (d_out, PROBES), W times Gaussian vectors.
        faint: an error of this share of the norm has no excess that could be told.
    """
    missed = shown - step.q @ (step.q.T @ shown)
    lacking = float(np.linalg.norm(missed)) / math.sqrt(shown.shape[1])
    whole, leading = float(np.sum(step.r**2)) + lacking**2, step.energies[-1]
    error = max(whole - leading, 0.0)
    excess = _excess(step.energies, error) if error > faint**2 * whole else 0.0
    return _Judged(lacking, math.sqrt(whole), math.sqrt(error), excess, len(step.energies) // 2)


def _excess(energies: Sequence[float], error: float) -> float:
    """Relative excess of an error over the optimum, from what the last two half steps gained: a geometric series.

    Args:
        energies: of the leading directions, after each half step.
        error: squared norm of what they lack, not 0.
    """
    if len(energies) < 3:
        return math.inf
    before, last = energies[-2] - energies[-3], max(energies[-1] - energies[-2], 0.0)
    ratio = min(max(last / before, 0.0), SLOWEST) if before > 0 else 0.0
    to_come = CAUTION * last * ratio / (1 - ratio)
    return 1 / math.sqrt(1 - to_come / error) - 1 if to_come < error else math.inf


def _told(step: _Step, found: _Judged, rounding: float, precision: type[np.floating]) -> Sketch:
    u, s, vt = np.linalg.svd(step.r.T)
    spectrum = signed(Spectrum(step.q @ u, s, vt @ step.z.T))
    bound = found.lacking / math.sqrt(SHARE)
    return Sketch(spectrum, found.lacking, bound, rounding, found.steps, found.excess, precision)
