"""Bases by products and by reflections span the same, and are orthonormal, whatever the matrix."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.lora.orthonormal import orthonormal
from tests.strategies import laws

columns_and_rows = st.tuples(st.integers(1, 12), st.integers(0, 30))


@laws
@given(columns_and_rows, st.floats(0, 20), st.floats(-100, 100), st.integers(0, 1 << 32))
def test_a_basis_is_orthonormal_and_gives_the_matrix_back(
    sizes: tuple[int, int], falls: float, scale: float, seed: int
) -> None:
    """From well to badly conditioned, and from tiny to huge."""
    k, more = sizes
    mixed, draw = np.linalg.qr(np.random.default_rng(seed).standard_normal((k, k)))[0], np.random.default_rng(seed + 1)
    y = 10.0**scale * (draw.standard_normal((k + more, k)) * np.logspace(0, -falls, k)) @ mixed
    q, r = orthonormal(y)

    np.testing.assert_allclose(q.T @ q, np.eye(k), atol=1e-13)
    assert float(np.linalg.norm(q @ r - y)) <= 1e-9 * float(np.linalg.norm(y))


@pytest.mark.parametrize(
    "y",
    [
        np.zeros((9, 4)),
        np.ones((9, 4)),
        np.eye(9, 4)[:, [0, 1, 1, 2]],
        np.eye(9, 4) * [1, 1e-12, 1, 0],
        np.eye(9, 4) * 1e200,
        np.eye(9, 4) * 1e-200,
        np.eye(4),
        np.zeros((9, 0)),
    ],
    ids=["zero", "one direction", "twice", "graded", "huge", "tiny", "square", "no column"],
)
def test_degenerate_matrices_have_bases_too(y: np.ndarray) -> None:
    q, r = orthonormal(y)

    np.testing.assert_allclose(q.T @ q, np.eye(y.shape[1]), atol=1e-13)
    np.testing.assert_allclose(q @ r, y, rtol=1e-13)


def test_reflections_are_left_to_the_matrices_that_need_them() -> None:
    draw = np.random.default_rng(1)
    good = draw.standard_normal((40, 6)) * np.logspace(0, -30, 6)
    # Nearly the same column twice: the Gram matrix cannot tell them apart.
    bad = good.copy()
    bad[:, 1] = bad[:, 0] * (1 + 1e-9 * draw.standard_normal(40))

    with patch.object(np.linalg, "qr", side_effect=AssertionError("by reflections")):
        orthonormal(good)
        with pytest.raises(AssertionError, match="by reflections"):
            orthonormal(bad)
