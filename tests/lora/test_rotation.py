"""Rotations between two factorisations of a product."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.lora.adapter import Pair
from edge_runtime.lora.algebra import decompose, take, to_pair
from edge_runtime.lora.rotation import Square, align, follow, rotate_row_squares, rotate_rows
from tests.strategies import gaussian

SEEDS = st.integers(0, 2**16)
RANKS = st.integers(1, 6)


def random_pair(draw: np.random.Generator, rank: int, d_out: int = 9, d_in: int = 7) -> Pair:
    return Pair(
        draw.standard_normal((rank, d_in)).astype(np.float32), draw.standard_normal((d_out, rank)).astype(np.float32)
    )


def orthogonal(draw: np.random.Generator, rank: int) -> Square:
    q, _ = np.linalg.qr(draw.standard_normal((rank, rank)))
    return np.asarray(q, np.float64)


def turned(pair: Pair, rotation: Square) -> Pair:
    """The same product in rows that were rotated."""
    return Pair((rotation @ pair.a).astype(np.float32), (pair.b @ rotation.T).astype(np.float32))


@given(SEEDS, RANKS)
def test_a_rotation_that_explains_all_is_found(seed: int, rank: int) -> None:
    draw = np.random.default_rng(seed)
    old, rotation = random_pair(draw, rank), orthogonal(draw, rank)
    found = align(turned(old, rotation), old)

    np.testing.assert_allclose(found.rotation, rotation, atol=1e-4)
    assert found.cosine == pytest.approx(1.0, abs=1e-5)


@given(SEEDS, RANKS)
def test_the_rotation_is_orthogonal_and_none_comes_nearer(seed: int, rank: int) -> None:
    draw = np.random.default_rng(seed)
    new, old = random_pair(draw, rank), random_pair(draw, rank)
    found = align(new, old)

    def distance(rotation: Square) -> float:
        near = turned(old, rotation)
        return float(np.sum((new.a - near.a) ** 2) + np.sum((new.b - near.b) ** 2))

    np.testing.assert_allclose(found.rotation @ found.rotation.T, np.eye(rank), atol=1e-9)
    others = [distance(orthogonal(draw, rank)) for _ in range(5)]
    assert distance(found.rotation) <= min(others) * (1 + 1e-5)
    assert 0.0 <= found.cosine <= 1.0


def test_factors_with_nothing_in_common_have_no_cosine() -> None:
    one, other = np.eye(4, 8, dtype=np.float32), np.eye(4, 8, 4, dtype=np.float32)
    nothing = np.zeros((5, 4), np.float32)

    assert align(Pair(one, nothing), Pair(other, nothing)).cosine == 0.0
    assert align(Pair(0 * one, nothing), Pair(0 * one, nothing)).cosine == 0.0


def test_the_factors_of_another_rank_are_refused() -> None:
    draw = np.random.default_rng(0)
    with pytest.raises(ValueError, match="rank 3"):
        align(random_pair(draw, 2), random_pair(draw, 3))


@given(SEEDS, RANKS)
def test_a_rotated_gradient_is_the_gradient_of_the_rotated_factors(seed: int, rank: int) -> None:
    """With W = b @ a and G = ∂loss/∂W: ∂/∂a = bᵀ G and ∂/∂b = G aᵀ."""
    draw = np.random.default_rng(seed)
    old, rotation = random_pair(draw, rank), orthogonal(draw, rank)
    new = turned(old, rotation)
    upstream = draw.standard_normal(old.shape).astype(np.float32)

    np.testing.assert_allclose(rotate_rows(rotation, old.b.T @ upstream), new.b.T @ upstream, atol=1e-4)
    np.testing.assert_allclose(rotate_rows(rotation, (upstream @ old.a.T).T).T, upstream @ new.a.T, atol=1e-4)


@given(SEEDS, RANKS)
def test_squares_stay_squares_and_keep_their_sum(seed: int, rank: int) -> None:
    draw = np.random.default_rng(seed)
    squares = (draw.standard_normal((rank, 7)) ** 2).astype(np.float32)
    rotated = rotate_row_squares(orthogonal(draw, rank), squares)

    assert rotated.min() >= 0
    np.testing.assert_allclose(rotated.sum(axis=0), squares.sum(axis=0), rtol=1e-5)


@given(SEEDS, RANKS)
def test_squares_follow_exchanged_and_reflected_directions_exactly(seed: int, rank: int) -> None:
    draw = np.random.default_rng(seed)
    rotation = np.eye(rank)[draw.permutation(rank)] * draw.choice([-1.0, 1.0], rank)
    gradients = draw.standard_normal((50, rank, 7)).astype(np.float32)
    squares = (gradients**2).sum(axis=0).astype(np.float32) / np.float32(50)
    truth = np.mean((rotation @ gradients) ** 2, axis=0)

    np.testing.assert_allclose(rotate_row_squares(rotation, squares), truth, rtol=1e-5)


# ── slices that move ──────────────────────────────────────────────────────────────────────────────────────────────


def handed_out(rank: int, seed: int = 0) -> Pair:
    """Directions as a server hands them out."""
    return to_pair(decompose([(1.0, gaussian((40, 60), rank, seed))]), 0, rank)


def test_a_slice_that_moved_is_followed_on_what_it_kept() -> None:
    whole = handed_out(6)
    found = follow(take(whole, (1, 3, 4)), take(whole, (0, 1, 4, 5)))

    np.testing.assert_allclose(found, [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]], atol=1e-6)


def test_a_slice_that_was_turned_is_followed_as_a_whole() -> None:
    old = handed_out(4)
    rotation, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 4)))
    new = Pair((rotation @ old.a).astype(np.float32), (old.b @ rotation.T).astype(np.float32))

    np.testing.assert_allclose(follow(new, old), rotation, atol=1e-5)
    assert np.array_equal(follow(new, old), align(new, old).rotation)


def test_slices_without_a_common_direction_share_nothing() -> None:
    whole = handed_out(6)

    assert not follow(take(whole, (0, 1)), take(whole, (2, 3, 4))).any()
    assert follow(take(whole, (0, 1)), take(whole, ())).shape == (2, 0)
    with pytest.raises(ValueError, match="equal shapes"):
        follow(whole, gaussian((41, 60), 6, 0))
