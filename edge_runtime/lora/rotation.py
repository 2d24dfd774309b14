"""Rotations between two factorisations of nearly the same product, and what they do to Adam's moments.

A server that re-factorises hands out (R a, b Rᵀ) for some orthogonal R in the place of (a, b): the same product, other
rows. A gradient follows its factor (g_a → R g_a, g_b → g_b Rᵀ), so what an optimiser remembers of gradients can follow
too.

Source: the orthogonal Procrustes problem, P. H. Schönemann, "A generalized solution of the orthogonal Procrustes
problem", Psychometrika 31 (1966), over both factors at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.lora.adapter import Matrix, Pair
from edge_runtime.lora.algebra import svd

Square = NDArray[np.float64]

SAME = 0.7
"""Cosine of a principal angle from which on a direction of one slice counts as one of another."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """How one factorisation lies to another.

    Attributes:
        rotation: (r, r) orthogonal, float64: the R for which R @ old.a and old.b @ R.T come nearest to the new factors.
        cosine: in [0, 1], between the new factors and the rotated old ones, all numbers of both as one vector; 1 where
            R explains all, 0 where the two have nothing in common.
    """

    rotation: Square
    cosine: float


def align(new: Pair, old: Pair) -> Alignment:
    """The orthogonal R that minimises ‖new.a - R old.a‖² + ‖new.b - old.b Rᵀ‖²: the polar factor of an r x r matrix.

    Cost O((d_in + d_out) r² + r³); the dense product is never formed.

    Raises:
        ValueError: pairs of different shape or rank.
    """
    if new.shape != old.shape or new.rank != old.rank:
        raise ValueError(
            f"an alignment needs equal shapes and ranks; found {new.shape} rank {new.rank} "
            f"and {old.shape} rank {old.rank}"
        )
    new_a, new_b, old_a, old_b = (factor.astype(np.float64) for factor in (new.a, new.b, old.a, old.b))
    u, s, vt = svd(new_a @ old_a.T + new_b.T @ old_b)
    sizes = [np.sqrt(np.sum(a * a) + np.sum(b * b)) for a, b in ((new_a, new_b), (old_a, old_b))]
    product = float(sizes[0] * sizes[1])
    return Alignment(u @ vt, min(1.0, float(s.sum()) / product) if product else 0.0)


def follow(new: Pair, old: Pair) -> Square:
    """Where the directions of a slice went, if only some of them are in the new one: `align` on what both have.

    A slice that moves loses directions and gains others; a rotation of all onto all would give one's memory to another.
    The common part is that of the principal angles between the two spans (factors side by side) whose cosine is at
    least SAME; if that is all of both, the result is the rotation of `align`. Cost as there.

    Args:
        new: the slice now, of rank r.
        old: the slice before, of any rank q; of the same shape.

    Returns:
        (r, q), a partial isometry: orthogonal on the common part, and zero on directions that only one of them has.

    Raises:
        ValueError: pairs of different shapes.
    """
    if new.shape != old.shape:
        raise ValueError(f"two slices of one layer have equal shapes; found {new.shape} and {old.shape}")
    if not new.rank or not old.rank:
        return np.zeros((new.rank, old.rank))
    (basis, tall), (old_basis, old_tall) = (np.linalg.qr(_beside(pair)) for pair in (new, old))
    u, cosines, vt = svd(basis.T @ old_basis)
    common = int(np.count_nonzero(cosines >= SAME))
    if common == new.rank == old.rank:
        return align(new, old).rotation
    shared = (u[:, :common] * cosines[:common]) @ vt[:common]
    u, _, vt = svd(tall.T @ shared @ old_tall)
    followed: Square = u[:, :common] @ vt[:common]
    return followed


def _beside(pair: Pair) -> Square:
    """(d_in + d_out, r): the factors of each direction as one column."""
    return np.concatenate([pair.a.T, pair.b]).astype(np.float64)


def rotate_rows(rotation: Square, values: Matrix) -> Matrix:
    """What the rotation makes of a gradient, or a mean of gradients, of `a`: R m. Of `b`, pass and take back m.T.

    Args:
        rotation: (r, r), or what `follow` found.
        values: (r, d).
    """
    rotated: Matrix = (rotation @ values.astype(np.float64)).astype(np.float32)
    return rotated


def rotate_row_squares(rotation: Square, squares: Matrix) -> Matrix:
    """What the rotation makes of a mean of squared gradients of `a`: (R ∘ R) v. Of `b`, pass and take back v.T.

    E[(Σⱼ Rᵢⱼ gⱼ)²] = Σⱼ Rᵢⱼ² E[gⱼ²] + cross terms. Only the squares were kept, so the cross terms are taken as zero:
    exact where the directions' gradients are uncorrelated, or R permutes directions and flips signs, else an
    approximation. Never negative, and the sum over the directions is kept, as the rotation keeps it in truth.

    Args:
        rotation: (r, r).
        squares: (r, d), none negative.
    """
    rotated: Matrix = ((rotation * rotation) @ squares.astype(np.float64)).astype(np.float32)
    return rotated
