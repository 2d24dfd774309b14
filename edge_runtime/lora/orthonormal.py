"""Thin orthonormal factors of tall matrices, by products alone where that is accurate.

    YᵀY = RᵀR,  Q = Y R⁻¹;  and once more, with Q in the place of Y

Householder reflections work through a tall matrix column by column and are bound by memory; the products here are not,
and take a fifth of the time. The Gram matrix squares the condition number, so whether the first round came near enough
for the second to end at rounding is measured, and where it did not, reflections do it after all.

Source: Y. Yamamoto, Y. Nakatsukasa, Y. Yanagisawa, T. Fukaya, "Roundoff error analysis of the CholeskyQR2 algorithm",
Electronic Transactions on Numerical Analysis 44 (2015). Differs from it: the condition is not assumed but measured.
"""

from __future__ import annotations

import numpy as np

from edge_runtime.lora.algebra import Wide

NEAR = 1e-4
"""How far QᵀQ may be from the identity after the first round, in Frobenius norm. It is off by eps times the squared
condition number, and Q R from Y by eps times the condition number: 1e-10 at most."""


def orthonormal(y: Wide) -> tuple[Wide, Wide]:
    """Factors y = q r, q with orthonormal columns.

    For matrices that are themselves known to float32's rounding: y - q r may be 1e-10 of y, where `numpy.linalg.qr`
    leaves 1e-15.

    Args:
        y: (d, k), k at most d; of any rank.

    Returns:
        q (d, k) and r (k, k).
    """
    q, r = _by_products(y) or np.linalg.qr(y)
    return q, r


def _by_products(y: Wide) -> tuple[Wide, Wide] | None:
    """The same, or None where it would not be accurate."""
    # What overflows or is not a number is not near the identity.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        try:
            q, first = _divided(y, y.T @ y)
            gram = q.T @ q
            if not np.linalg.norm(gram - np.eye(gram.shape[0])) < NEAR:
                return None
            q, second = _divided(q, gram)
        except np.linalg.LinAlgError:
            return None
    return q, np.asarray(second @ first)


def _divided(y: Wide, gram: Wide) -> tuple[Wide, Wide]:
    r = np.asarray(np.linalg.cholesky(gram).T, np.float64)
    return y @ np.linalg.inv(r), r
