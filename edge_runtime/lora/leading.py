"""The leading directions of one sum that lies in memory: exactly, or by a range finder, whichever costs less.

What is left out is always known: exactly, where the decomposition is exact or the Gram matrices of the factors are
affordable beside a sketch; else as probes show it, with a bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from edge_runtime.lora.algebra import Spectrum, Wide, factorise, image, tail_norm
from edge_runtime.lora.columns import Columns, magnitude, squared_norm, stacked
from edge_runtime.lora.sketch import DOUBLE, SINGLE, Sketch, sketch

EXCESS = 1e-4
"""Relative excess over the optimal error that a sketch is allowed by default."""
OVERSAMPLING = 16
"""Directions searched for beyond those kept, and beyond one and a half times the rank: what is near the edge of a range
is found last."""
SMALL = 2e8
"""What takes a few milliseconds is done exactly."""
HALVES = 3
"""Half steps that a sketch is expected to take, when costs are compared."""
QR_COST, BASIS_COST, SVD_COST, DOUBLE_COST = 12.0, 10.0, 3.0, 2.4
"""Time of a floating point operation in a thin QR, in an orthonormal basis by products (of 2 d k² operations), in the
SVD of a core, and in a product in float64, in units of one in a float32 product; measured with OpenBLAS on one core."""
WORTH = 0.6
"""A sketch is taken where it costs less than this share of the exact way, which is worth something by itself."""
GRAMS_WORTH = 0.5
"""The Gram matrices are affordable where they cost less than this share of the sketch."""
GRAMS_FAINT = 0.03
"""Where less than this share of the norm is lacking, the Gram matrices are computed in float64: what is captured is
subtracted from them."""


@dataclass(frozen=True, eq=False)
class Leading:
    """The leading directions of a sum, and what is known of the rest.

    Attributes:
        spectrum: the directions.
        norm: Frobenius norm of the sum.
        lacking: Frobenius norm of what the directions lack, exact or estimated.
        bound: a number that it does not exceed, but for rounding.
        missed: (d_out, PROBES), the probes times what the directions lack; (d_out, 0) where no probes were given.
        rounding: how far the directions may be off by rounding.
        how: the way that was taken; "stream" if the sum was never in memory as a whole.
        why: what decided that, for people.
    """

    spectrum: Spectrum
    norm: float
    lacking: float
    bound: float
    missed: Wide
    rounding: float
    how: Literal["exact", "sketch", "stream"]
    why: str

    def truncated(self, rank: int) -> float:
        """Frobenius norm of what the first `rank` directions lack, as exactly as `lacking`."""
        return math.hypot(self.lacking, tail_norm(self.spectrum, rank))

    def certificate(self, rank: int) -> float:
        """A number that the error of the first `rank` directions does not exceed.

        What a decomposition lacks is orthogonal to what it has; what several left out one after the other need not be.
        """
        tail = tail_norm(self.spectrum, rank)
        return self.rounding + (self.bound + tail if self.how == "stream" else math.hypot(self.bound, tail))


def leading(
    parts: Sequence[Columns],
    rank: int,
    keep: int,
    *,
    seed: str,
    excess: float = EXCESS,
    spare: int = OVERSAMPLING,
    probes: Wide | None = None,
) -> Leading:
    """The first `keep` directions of the sum of all parts.

    Args:
        parts: of one shape, all in memory.
        rank: to which the sum will be cut; there the excess is judged.
        keep: directions wanted, at least `rank`; fewer come back where there are no more.
        seed: names the random draws of a sketch.
        excess: relative, of the error over the optimum, that is allowed.
        spare: directions that a sketch searches for beyond those.
        probes: (d_in, PROBES), whose image of what is left out is wanted; see `sketch.probes_from`.
    """
    d_out, d_in = parts[0].shape
    count, smallest = sum(part.count for part in parts), min(d_out, d_in)
    keep = min(keep, smallest, count)
    width = max(1, min(max(keep, rank + rank // 2) + spare, smallest, count))
    exactly, sketched = _exact_cost(d_out, d_in, count), _sketch_cost(d_out, d_in, count, width)
    costs = f"{count} columns; {_flops(exactly)} exactly, {_flops(sketched)} by a sketch of {width}"
    if exactly < SMALL or sketched >= WORTH * exactly:
        return _exact(parts, keep, probes, costs)
    grams = (d_out + d_in) * count**2
    found = sketch(parts, rank, width, excess=excess, seed=seed, probes=probes)
    if found.excess > excess:
        why = f"{costs}, whose excess stayed at {found.excess:.1e} after {found.steps} steps"
        return _exact(parts, keep, probes, why)
    told = _sketched(parts, found, keep, costs, grams=grams < GRAMS_WORTH * sketched)
    if probes is None:
        return told
    return replace(told, missed=found.missed + image(found.spectrum, probes, keep))


def _exact(parts: Sequence[Columns], keep: int, probes: Wide | None, why: str) -> Leading:
    whole = factorise(*stacked(parts))
    kept = Spectrum(whole.u[:, :keep], whole.s[:keep], whole.vt[:keep])
    lacking, rounding = tail_norm(whole, keep), 64 * DOUBLE * magnitude(parts)
    missed = whole.u[:, :0] if probes is None else image(whole, probes, keep)
    return Leading(kept, tail_norm(whole, 0), lacking, lacking, missed, rounding, "exact", why)


def _sketched(parts: Sequence[Columns], found: Sketch, keep: int, costs: str, *, grams: bool) -> Leading:
    s, whole = found.spectrum.s, found.lacking
    told = f"{costs}; {found.steps} steps, excess {found.excess:.0e}, {np.dtype(found.precision).name}"
    kept = Spectrum(found.spectrum.u[:, :keep], s[:keep], found.spectrum.vt[:keep])
    beyond, captured = float(np.sum(s[keep:] ** 2)), float(np.sum(s**2))
    bound = found.bound
    if grams:
        faint = whole < GRAMS_FAINT * math.sqrt(captured)
        precision = np.float64 if faint or found.precision is np.float64 else np.float32
        left = squared_norm(parts, precision) - captured
        noise = 64 * (DOUBLE if found.precision is np.float64 else SINGLE) * magnitude(parts) ** 2
        if left > 8 * noise:
            whole, bound = math.sqrt(left), min(bound, math.sqrt(left + noise))
            told += "; error by Gram matrices"
    lacking, most = math.sqrt(whole**2 + beyond), math.sqrt(bound**2 + beyond)
    norm = math.sqrt(whole**2 + captured)
    return Leading(kept, norm, lacking, most, kept.u[:, :0], found.rounding, "sketch", told)


def _exact_cost(d_out: int, d_in: int, count: int) -> float:
    """Of two thin QRs, the SVD of the core and two products, in operations of a float32 product."""
    left, right = min(d_out, count), min(d_in, count)
    core = min(left, right)
    qr = QR_COST * 4 * count * (d_out * left + d_in * right)
    return qr + SVD_COST * 22 * core**2 * max(left, right) + DOUBLE_COST * 2 * (d_out * left + d_in * right) * core


def _sketch_cost(d_out: int, d_in: int, count: int, width: int) -> float:
    """Of the products with the factors and the bases of a few half steps, in operations of a float32 product."""
    return (HALVES + 1) * (d_out + d_in) * width * (2 * count + BASIS_COST * width)


def _flops(cost: float) -> str:
    return f"{cost / 1e9:.2g} G"
