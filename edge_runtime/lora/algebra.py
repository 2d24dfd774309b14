"""Algebra on low-rank products that never forms the dense d_out x d_in matrix.

Every function is pure. Sums are taken in float64 and the core decomposition is float64, because the factors of a
nearly converged fleet nearly cancel; results return to float32 at the end.

Identity used throughout (thin QR of both sides, SVD of the small core):

    B A = Q_B R_B (Q_A R_A)^T,   R_B R_A^T = U S V^T   =>   B A = (Q_B U) S (Q_A V)^T

Cost O((d_out + d_in) R^2 + R^3) for stacked rank R, against O(d_out d_in min(d_out, d_in)) for the dense SVD.
Source: the factored form is the QR-core identity of FLoRIST (MLSys 2026), with QR in the place of two thin SVDs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.lora.adapter import Matrix, Pair

Wide = NDArray[np.float64]

ROW_NORM = float(np.sqrt(1.0 / 3.0))
"""Norm of a row of `a` under the usual LoRA initialisation, U(-1/sqrt(d_in), 1/sqrt(d_in)): sqrt(1/3) = 0.577."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A product in its singular form, u @ diag(s) @ vt; s falls and its signs are fixed.

    Attributes:
        u: (d_out, R) orthonormal columns, float64.
        s: (R,) singular values >= 0, falling, float64.
        vt: (R, d_in) orthonormal rows, float64.
    """

    u: Wide
    s: NDArray[np.float64]
    vt: Wide

    @property
    def numerical_rank(self) -> int:
        """Directions whose singular value is above float32's noise on the largest."""
        if self.s.size == 0 or self.s[0] == 0.0:
            return 0
        floor = self.s[0] * np.finfo(np.float32).eps * max(self.u.shape[0], self.vt.shape[1])
        return int(np.count_nonzero(self.s > floor))


def zero(shape: tuple[int, int], rank: int = 0) -> Pair:
    """The zero change of a layer of that (d_out, d_in) shape, at that rank."""
    d_out, d_in = shape
    return Pair(np.zeros((rank, d_in), np.float32), np.zeros((d_out, rank), np.float32))


def cut(pair: Pair, rank: int) -> Pair:
    """The first `rank` directions (all of them if there are fewer)."""
    return Pair(pair.a[:rank], pair.b[:, :rank])


def take(pair: Pair, directions: Sequence[int]) -> Pair:
    """The named directions, in the named order.

    Raises:
        ValueError: a direction that the pair does not have.
    """
    index = np.asarray(directions, dtype=np.intp)
    if index.size and (index.min() < 0 or index.max() >= pair.rank):
        raise ValueError(f"directions must lie in [0, {pair.rank}); found {tuple(directions)}")
    return Pair(np.ascontiguousarray(pair.a[index]), np.ascontiguousarray(pair.b[:, index]))


def pad(pair: Pair, rank: int) -> Pair:
    """The pair with zero directions appended up to `rank`; its product does not change.

    Raises:
        ValueError: the pair is already wider than that.
    """
    extra = rank - pair.rank
    if extra < 0:
        raise ValueError(f"cannot pad a pair of rank {pair.rank} to rank {rank}")
    return Pair(np.pad(pair.a, ((0, extra), (0, 0))), np.pad(pair.b, ((0, 0), (0, extra))))


def scale(pair: Pair, factor: float) -> Pair:
    """The pair whose product is `factor` times as large."""
    return Pair(pair.a, (pair.b * np.float32(factor)).astype(np.float32))


def stack(pairs: Iterable[tuple[float, Pair]]) -> tuple[Wide, Wide]:
    """Factors of a weighted sum of products, sum_k w_k b_k a_k = b @ a, by concatenation.

    Returns:
        b (d_out, R) and a (R, d_in) in float64, R the sum of the ranks. The square root of |w| goes to each side,
        so that neither is badly scaled; the sign goes to b.

    Raises:
        ValueError: no pair at all, or pairs of different shapes.
    """
    left: list[Wide] = []
    right: list[Wide] = []
    shape: tuple[int, int] | None = None
    for weight, pair in pairs:
        if shape is not None and pair.shape != shape:
            raise ValueError(f"cannot stack products of shapes {shape} and {pair.shape}")
        shape = pair.shape
        root = float(np.sqrt(abs(weight)))
        left.append(pair.b.astype(np.float64) * (root if weight >= 0 else -root))
        right.append(pair.a.astype(np.float64) * root)
    if shape is None:
        raise ValueError("cannot stack an empty sequence of pairs")
    return np.concatenate(left, axis=1), np.concatenate(right, axis=0)


def decompose(pairs: Iterable[tuple[float, Pair]]) -> Spectrum:
    """The exact singular form of a weighted sum of products, sum_k w_k b_k a_k.

    Args:
        pairs: (weight, pair), all of one (d_out, d_in) shape.

    Returns:
        A Spectrum of R = min(sum of ranks, d_out, d_in) directions. In each, the entry of u with the largest magnitude
        is positive, so that equal inputs give equal bytes.
    """
    return factorise(*stack(pairs))


def svd(matrix: Wide) -> tuple[Wide, Wide, Wide]:
    """The thin SVD u, s, vt of any matrix of finite numbers.

    LAPACK's iterations end without a result on some triangular matrices whose singular values fall over nine orders of
    magnitude, in whichever precision and scale; on the same matrix turned or upside down they converge.

    Raises:
        numpy.linalg.LinAlgError: none of these did.
    """
    try:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    except np.linalg.LinAlgError:
        try:
            v, s, ut = np.linalg.svd(matrix.T, full_matrices=False)
            u, vt = ut.T, v.T
        except np.linalg.LinAlgError:
            u, s, vt = np.linalg.svd(matrix[::-1], full_matrices=False)
            u = u[::-1]
    return u, s, vt


def factorise(b: Wide, a: Wide) -> Spectrum:
    """The exact singular form of b @ a: thin QR of both factors, SVD of the small core.

    Args:
        b: (d_out, R).
        a: (R, d_in).
    """
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    u, s, vt = svd(r_b @ r_a.T)
    return signed(Spectrum(q_b @ u, s, vt @ q_a.T))


def signed(spectrum: Spectrum) -> Spectrum:
    """The same product, its signs chosen so that in each column of u the entry of largest magnitude is positive."""
    u = spectrum.u
    if not u.size:
        return spectrum
    peak = np.argmax(np.abs(u), axis=0)
    sign = np.where(u[peak, np.arange(u.shape[1])] < 0, -1.0, 1.0)
    return Spectrum(u * sign, spectrum.s, spectrum.vt * sign[:, None])


def image(spectrum: Spectrum, x: Wide, start: int = 0) -> Wide:
    """The product of the directions from `start` on with x (d_in, k); (d_out, k)."""
    u, s, vt = spectrum.u[:, start:], spectrum.s[start:], spectrum.vt[start:]
    return np.asarray(u @ (s[:, None] * (vt @ x)))


def to_pair(spectrum: Spectrum, start: int = 0, stop: int | None = None) -> Pair:
    """Directions start..stop of a spectrum as a pair: a = c v^T with rows of norm c = ROW_NORM, b = u s / c.

    Rows of `a` then have the size that training expects, whatever the singular values are.
    """
    u, s, vt = spectrum.u[:, start:stop], spectrum.s[start:stop], spectrum.vt[start:stop]
    return Pair((ROW_NORM * vt).astype(np.float32), (u * (s / ROW_NORM)).astype(np.float32))


def draw_from(seed: str, shape: tuple[int, int]) -> Wide:
    """Standard normal numbers that a text names: the same text and shape give the same numbers."""
    digest = hashlib.sha256(seed.encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal(shape)


def fresh_rows(existing: Matrix, count: int, seed: str) -> Matrix:
    """New rows of `a`, of norm ROW_NORM, orthogonal to the existing rows and to each other.

    Args:
        existing: (r, d_in) rows to stay clear of.
        count: rows wanted; fewer come back when r + count would exceed d_in.
        seed: text that names the draw (layer, version, fleet seed); the same text gives the same rows.

    Returns:
        (count, d_in) float32.
    """
    rank, d_in = existing.shape
    count = min(count, d_in - rank)
    if count <= 0:
        return np.zeros((0, d_in), np.float32)
    draw = draw_from(seed, (count, d_in))
    norms = np.linalg.norm(existing, axis=1, keepdims=True)
    # A row of zeros spans nothing; it would only put a division by zero into the basis.
    basis = (existing / np.where(norms == 0, 1, norms)).astype(np.float64)[norms[:, 0] > 0]
    q, _ = np.linalg.qr(np.concatenate([basis, draw]).T)
    return np.ascontiguousarray((ROW_NORM * q.T[-count:]).astype(np.float32))


def refill(pair: Pair, rank: int, seed: str) -> Pair:
    """The pair with fresh directions (new rows of a, zero columns of b) appended up to `rank`.

    The product does not change; devices get something to learn in. Without this, a direction with b = 0 and a = 0
    would have no gradient at all.
    """
    rows = fresh_rows(pair.a, rank - pair.rank, seed)
    return Pair(
        np.concatenate([pair.a, rows]),
        np.concatenate([pair.b, np.zeros((pair.b.shape[0], rows.shape[0]), np.float32)], axis=1),
    )


def inner(x: Pair, y: Pair) -> float:
    """Frobenius inner product of two products, tr((b_x a_x)^T b_y a_y), in O((d_out + d_in) r_x r_y)."""
    gram_b = x.b.astype(np.float64).T @ y.b.astype(np.float64)
    gram_a = x.a.astype(np.float64) @ y.a.astype(np.float64).T
    return float(np.sum(gram_b * gram_a))


def norm(pair: Pair) -> float:
    """Frobenius norm of the product, without forming it.

    Through the R factors of both sides, not through Gram matrices: a Gram matrix squares the condition number.
    """
    return size_of(pair.b.astype(np.float64), pair.a.astype(np.float64))


def distance(x: Pair, y: Pair) -> float:
    """Frobenius norm of the difference of two products of one shape, without forming either.

    Through R factors, as in `norm`: two products that nearly agree cancel in the small core and not in float32.
    """
    return size_of(*stack([(1.0, x), (-1.0, y)]))


def size_of(b: Wide, a: Wide) -> float:
    """Frobenius norm of b @ a, (d_out, R) and (R, d_in), without forming it."""
    if b.shape[1] == 0:
        return 0.0
    return float(np.linalg.norm(np.linalg.qr(b)[1] @ np.linalg.qr(a.T)[1].T))


def tail_norm(spectrum: Spectrum, rank: int) -> float:
    """Frobenius norm of what a cut to `rank` drops: the exact truncation error (Eckart-Young)."""
    return float(np.sqrt(np.sum(spectrum.s[rank:] ** 2)))


def change(after: Pair, before: Pair) -> Pair:
    """Factor-wise difference: what was added to `a` and to `b`. Not a product; only `changed` undoes it.

    Training moves both factors a little, so the change is small and packs into few bits.

    Raises:
        ValueError: pairs of different shape or rank.
    """
    if after.shape != before.shape or after.rank != before.rank:
        raise ValueError(
            f"a change needs equal shapes and ranks; found {after.shape} rank {after.rank} "
            f"and {before.shape} rank {before.rank}"
        )
    return Pair(after.a - before.a, after.b - before.b)


def changed(before: Pair, by: Pair) -> Pair:
    """The pair that `by`, a factor-wise difference, leads to from `before`.

    Raises:
        ValueError: pairs of different shape or rank.
    """
    if before.shape != by.shape or before.rank != by.rank:
        raise ValueError(
            f"a change of {by.shape} rank {by.rank} does not fit a pair of {before.shape} rank {before.rank}"
        )
    return Pair(before.a + by.a, before.b + by.b)
