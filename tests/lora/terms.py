"""Weighted sums of products for the laws of the algebra, and the dense sum, which is the definition of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_runtime.lora import algebra
from edge_runtime.lora.adapter import Pair
from edge_runtime.lora.algebra import Spectrum
from edge_runtime.lora.columns import Columns, chunks
from tests.strategies import gaussian

Wide = NDArray[np.float64]
Terms = list[tuple[float, Pair]]


def dense(terms: Terms) -> Wide:
    """The naive weighted sum of products, in float64."""
    return sum((w * (p.b.astype(np.float64) @ p.a.astype(np.float64)) for w, p in terms), np.zeros(terms[0][1].shape))


def magnitude(terms: Terms) -> float:
    """How large the terms are together; what cancels is still there."""
    return float(sum(abs(w) * np.linalg.norm(p.b) * np.linalg.norm(p.a) for w, p in terms))


@st.composite
def weighted(draw: st.DrawFn) -> Terms:
    """Sums of up to four pairs: any weights, any ranks, some degenerate, some that cancel."""
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    terms: Terms = []
    for _ in range(draw(st.integers(1, 4))):
        pair = gaussian(shape, draw(st.integers(0, 7)), draw(st.integers(0, 1 << 32)))
        match draw(st.sampled_from(["general", "zero", "repeated", "uneven", "cancelling"])):
            case "zero":
                pair = algebra.zero(shape, pair.rank)
            case "repeated":  # a direction twice: the factors are rank-deficient
                pair = algebra.take(pair, [0] * pair.rank)
            case "uneven":
                pair = Pair(pair.a, pair.b * np.logspace(0, -6, pair.rank, dtype=np.float32))
            case "cancelling":
                pair = terms[-1][1] if terms else pair
        weight = draw(st.integers(-300, 300)) / 100
        terms.append((-terms[-1][0] if terms and terms[-1][1] is pair else weight, pair))
    return terms


@st.composite
def fleets(draw: st.DrawFn) -> Terms:
    """Sums as they come from a fleet, wide enough for a range finder: some shared directions, and much noise.

    Some have little noise, or none, so that the sum has fewer directions than are searched for; in some the terms
    nearly cancel, as trained slices and received ones do; some hold a term of no effect.
    """
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    d_out, d_in, count = draw(st.integers(24, 40)), draw(st.integers(24, 40)), draw(st.integers(1, 12))
    noise, decay = draw(st.sampled_from([0.0, 1e-4, 0.1, 1.0])), draw(st.sampled_from([0.0, 0.5, 2.0]))
    b, a = rng.standard_normal((d_out, 4)), rng.standard_normal((4, d_in))
    terms: Terms = []
    for _ in range(count):
        rank = int(rng.choice([1, 2, 4, 8]))
        sizes = np.arange(1.0, rank + 1) ** -decay
        left, right = noise * rng.standard_normal((d_out, rank)), rng.standard_normal((rank, d_in))
        left[:, : min(rank, 4)] += b[:, :rank]
        right[: min(rank, 4)] += a[:rank]
        terms.append((float(rng.integers(1, 9)) / count, Pair(right.astype(np.float32), _float32(left * sizes))))
    match draw(st.sampled_from(["plain", "cancelling", "zero"])):
        case "cancelling":
            terms += [(-w, Pair(p.a, _float32(p.b * (1 + 1e-4 * rng.standard_normal(p.b.shape))))) for w, p in terms]
        case "zero":
            terms += [(0.0, gaussian((d_out, d_in), 3, 1)), (1.0, algebra.zero((d_out, d_in), 2))]
    return terms


def _float32(x: Wide) -> NDArray[np.float32]:
    return x.astype(np.float32)


def columns(terms: Terms) -> Columns:
    """All terms in one chunk."""
    [found] = chunks(terms, max(1, directions(terms)))
    return found


def directions(terms: Terms) -> int:
    """Of all terms together."""
    return sum(pair.rank for _, pair in terms)


def product(spectrum: Spectrum, rank: int) -> Wide:
    """The dense product of the first directions."""
    return np.asarray((spectrum.u[:, :rank] * spectrum.s[:rank]) @ spectrum.vt[:rank])


def best(whole: Wide, rank: int) -> float:
    """The least error of any product of that rank."""
    return float(np.linalg.norm(np.linalg.svd(whole, compute_uv=False)[rank:]))


def gauged(terms: Terms, seed: int) -> Terms:
    """The same products in other factors: B Q and Q⁻¹ A for random Q of modest condition."""
    draw, found = np.random.default_rng(seed), []
    for weight, pair in terms:
        q = np.eye(pair.rank) + 0.3 * draw.standard_normal((pair.rank, pair.rank)) / max(1, pair.rank) ** 0.5
        found.append((weight, Pair(_float32(np.linalg.inv(q) @ pair.a), _float32(pair.b @ q))))
    return found


def shuffled(terms: Terms, seed: int) -> Sequence[tuple[float, Pair]]:
    """The same terms in another order."""
    return [terms[index] for index in np.random.default_rng(seed).permutation(len(terms))]
