"""The joint basis of what devices changed in one layer: few directions, in which every change is a small matrix.

    H_U = sum_k D_k D_kᵀ / ||D_k||²,   H_V = sum_k D_kᵀ D_k / ||D_k||²
    U, V = their leading eigenvectors,   C_k = Uᵀ D_k V,   D_k = U C_k Vᵀ

Both sums depend on the products D_k alone, so the basis does not depend on how a device factorises its product or on
the order of devices; signs do not matter, because a trimmed mean of negated values is the negated one. Where directions
carry equal energy to rounding, any rotation of them is as good, and so is what a rule finds in it.

Every change has unit norm in them. Rules that go entry by entry depend on the basis, and in a basis of the changes as
they are, a device that sends a large one would choose it alone: the leading directions would be its own, and those of
honest devices would be cut off, or drown in the rounding of its own. As it is, f of n devices have f of n parts of the
energy, however far they go.

No matrix of d_out x d_in is formed. Cost for R directions of all changes together and p of the basis: that of the sum
H, see `edge_runtime.lora.leading`: O(d R²) exactly, or O(d R p) a step by a sketch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.lora.adapter import Matrix, Pair
from edge_runtime.lora.algebra import decompose
from edge_runtime.lora.columns import BLOCK, Columns
from edge_runtime.lora.leading import leading
from server.aggregators.robust.geometry import Wide

EXCESS = 0.05
"""Relative, of the error over the optimum, that a sketch of the basis may have at half of its directions. What the
basis lacks is known exactly, so a better one is worth little."""
NOISE = 1e-13
"""A direction of less than this share of the first one's energy is rounding: factors are kept in float32."""
ROUNDING = 16 * float(np.finfo(np.float64).eps)
"""A direction of a change of less than this share of its factors' size is what cancellation left."""


@dataclass(frozen=True, eq=False)
class Changes:
    """What n devices changed in one layer, in R singular directions, device after device.

    Attributes:
        u: (R, d_out), a left singular direction in each row, float32.
        v: (R, d_in), a right one, float32.
        s: (R,) singular values, float64.
        parts: of each device, its rows.
    """

    u: Matrix
    v: Matrix
    s: NDArray[np.float64]
    parts: tuple[slice, ...]

    @property
    def squares(self) -> Wide:
        """(n,) squared Frobenius norm of each change."""
        return np.asarray([np.sum(self.s[part] ** 2) for part in self.parts])


def changes(devices: Iterable[Sequence[tuple[float, Pair]]]) -> Changes:
    """The changes of one layer, each given as a weighted sum of products of one shape."""
    u, v, s = [], [], []
    for terms in devices:
        found = decompose(terms)
        size = sum(abs(weight) * _norm(pair.b) * _norm(pair.a) for weight, pair in terms)
        held = int(np.count_nonzero(found.s > ROUNDING * size))
        u.append(found.u[:, :held].T.astype(np.float32))
        v.append(found.vt[:held].astype(np.float32))
        s.append(found.s[:held])
    edges = np.cumsum([0, *(part.size for part in s)])
    parts = tuple(slice(int(start), int(stop)) for start, stop in itertools.pairwise(edges))
    return Changes(np.concatenate(u), np.concatenate(v), np.concatenate(s), parts)


def _norm(factor: Matrix) -> float:
    """Frobenius norm; the square of a float32 may be more than a float32 holds."""
    return float(np.linalg.norm(factor.astype(np.float64)))


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal directions of both sides.

    Attributes:
        u: (d_out, p), float64.
        v: (q, d_in), float64.
        whole: whether every change lies in them, to rounding.
    """

    u: Wide
    v: Wide
    whole: bool


def basis(found: Changes, most: int, *, seed: str) -> Basis:
    """The joint basis of changes of which at least one is not zero.

    Args:
        found: the changes.
        most: directions on either side.
        seed: names the random draws.
    """
    energies = np.zeros_like(found.s)
    for part, square in zip(found.parts, found.squares, strict=True):
        if square > 0:
            energies[part] = found.s[part] ** 2 / square
    left, all_left = _side(found.u, energies, most, f"{seed}:left")
    right, all_right = _side(found.v, energies, most, f"{seed}:right")
    return Basis(left, np.ascontiguousarray(right.T), all_left and all_right)


def _side(rows: Matrix, energies: NDArray[np.float64], most: int, seed: str) -> tuple[Wide, bool]:
    """(d, p) leading eigenvectors of rowsᵀ diag(energies) rows, and whether they are all there are."""
    found = leading([Columns(rows, rows, energies)], most // 2, most, seed=seed, excess=EXCESS).spectrum
    held = int(np.count_nonzero(found.s > NOISE * found.s[0]))
    return found.u[:, :held], held < most or held == rows.shape[1]


def coordinates(found: Changes, base: Basis) -> tuple[Wide, Wide]:
    """(p, R) and (R, q) factors of the changes in the basis: C_k = left[:, k] s[k] right[k] with k the rows of one."""
    left, right = np.empty((base.u.shape[1], found.s.size)), np.empty((found.s.size, base.v.shape[0]))
    for start in range(0, found.s.size, BLOCK):
        at = slice(start, start + BLOCK)
        left[:, at] = base.u.T @ found.u[at].T.astype(np.float64)
        right[at] = found.v[at].astype(np.float64) @ base.v.T
    return left, right
