"""Sums too long for memory: a running sum of few directions, and what it has left out so far.

A sum is taken in chunks as wide as memory allows. Each chunk and the directions kept so far are decomposed together,
and cut to a cap. One decomposition of many columns is far cheaper, and loses less, than many of few. Weights need not
sum to one: the sum is linear, so whoever knows the total divides at the end.

    ‖sum - kept‖ <= sum over the cuts of ‖what each left out‖        (triangle inequality)

Where all cuts share their probes, the images of what each left out add up to that of the whole, which is much nearer.

Two partial sums are added in the same way, so a tree of them is the sum of all, within what all cuts left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.lora.algebra import Spectrum, Wide
from edge_runtime.lora.columns import Columns, of_spectrum
from edge_runtime.lora.leading import EXCESS, leading


@dataclass(frozen=True, eq=False)
class Partial:
    """A sum so far.

    Attributes:
        spectrum: its directions, at most the cap.
        bound: how far they are from the sum, at most, in Frobenius norm.
        cuts: how often something was left out.
        missed: (d_out, PROBES), the probes times all that was left out; (d_out, 0) where there are none.
        rounding: how far the directions may be off by rounding; part of `bound`.
    """

    spectrum: Spectrum
    bound: float
    cuts: int
    missed: Wide
    rounding: float = 0.0


def nothing(shape: tuple[int, int], probes: int = 0) -> Partial:
    """The empty sum of a (d_out, d_in) shape, of which so many probes will be asked."""
    d_out, d_in = shape
    spectrum = Spectrum(np.zeros((d_out, 0)), np.zeros(0), np.zeros((0, d_in)))
    return Partial(spectrum, 0.0, 0, np.zeros((d_out, probes)))


def absorb(
    partial: Partial,
    more: Sequence[Columns],
    rank: int,
    cap: int,
    *,
    seed: str,
    excess: float = EXCESS,
    probes: Wide | None = None,
) -> Partial:
    """The sum with more columns, cut to `cap` directions.

    Args:
        partial: the sum so far.
        more: columns of the same shape.
        rank: directions that will be wanted in the end; they are found to the excess, those beyond as far as they are.
        cap: directions kept.
        seed: names the random draws.
        excess: relative, of the error of a cut to the rank over the optimum.
        probes: (d_in, PROBES), the same for all cuts of the sum.
    """
    parts = [of_spectrum(partial.spectrum, cap), *more]
    # The cap is more than what will be wanted: it needs no spare directions, and keeps all that are found.
    found = leading(parts, rank, cap, seed=f"{seed}:{partial.cuts}", excess=excess, spare=0, probes=probes)
    missed = found.missed if probes is None else partial.missed + found.missed
    bound, rounding = partial.bound + found.certificate(cap), partial.rounding + found.rounding
    return Partial(found.spectrum, bound, partial.cuts + 1, missed, rounding)


def join(one: Partial, two: Partial, rank: int, cap: int, *, seed: str, excess: float = EXCESS) -> Partial:
    """The sum of two partial sums, cut to `cap` directions; associative within what the cuts leave out."""
    both = absorb(one, [of_spectrum(two.spectrum, two.spectrum.s.size)], rank, cap, seed=seed, excess=excess)
    rounding = both.rounding + two.rounding
    return Partial(both.spectrum, both.bound + two.bound, both.cuts + two.cuts, both.missed, rounding)


def scaled(partial: Partial, factor: float) -> Partial:
    """The sum times a positive number.

    Raises:
        ValueError: a factor that is not positive.
    """
    if not factor > 0:
        raise ValueError(f"a partial sum is scaled by a positive number; found {factor}")
    whole = partial.spectrum
    return Partial(
        Spectrum(whole.u, whole.s * factor, whole.vt),
        partial.bound * factor,
        partial.cuts,
        partial.missed * factor,
        partial.rounding * factor,
    )
