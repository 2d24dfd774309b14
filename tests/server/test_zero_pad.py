"""HetLoRA's padded mean of factors, and exactly how it is biased."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from server.aggregators.zero_pad import zero_pad
from tests.server.merging import (
    LAYER,
    MIXED_RANKS,
    dense,
    energy_kept,
    idle,
    learnt_state,
    naive_svd,
    updates_from,
    wide_state,
)


@settings(max_examples=20, deadline=None)
@given(devices=st.integers(1, 4), rank=st.integers(1, 8), seed=st.integers(0, 2**16))
def test_the_bias_is_the_weighted_covariance_of_the_factors(devices: int, rank: int, seed: int) -> None:
    """At equal ranks: sum_k p_k B_k A_k - B A = sum_{j<k} p_j p_k (B_j - B_k)(A_j - A_k)."""
    state = learnt_state(rank)
    updates = updates_from(state, zero_pad(), [rank] * devices, seed=seed, size=0.5)
    merged = zero_pad().combine(state, updates).state
    total = sum(update.weight for update in updates)
    pairs = [(u.weight / total, u.trained[LAYER].a.astype(float), u.trained[LAYER].b.astype(float)) for u in updates]
    covariance = sum(
        (p * q * (b - d) @ (a - c) for (p, a, b), (q, c, d) in itertools.combinations(pairs, 2)),
        start=np.zeros((14, 18)),
    )
    bias = naive_svd(state, updates, LAYER) - dense(merged.adapter)[LAYER]
    assert np.allclose(bias, covariance, atol=2e-6)
    assert devices == 1 or np.linalg.norm(covariance) > 0.01


def test_each_row_is_the_mean_over_all_devices_with_zeros_where_a_device_has_none() -> None:
    state = learnt_state(6)
    small, large = updates_from(state, zero_pad(), [2, 4], weights=[1.0, 3.0])
    after = zero_pad().combine(state, [small, large]).state.adapter[LAYER]
    assert np.allclose(after.a[:2], 0.25 * small.trained[LAYER].a + 0.75 * large.trained[LAYER].a[:2], atol=1e-6)
    assert np.allclose(after.a[2:4], 0.75 * large.trained[LAYER].a[2:], atol=1e-6)
    assert np.allclose(after.b[:, 2:4], 0.75 * large.trained[LAYER].b[:, 2:], atol=1e-6)


def test_directions_that_nobody_trained_keep_their_value() -> None:
    state = learnt_state(6)
    after = zero_pad().combine(state, updates_from(state, zero_pad(), [2, 4])).state.adapter[LAYER]
    assert np.array_equal(after.a[4:], state.adapter[LAYER].a[4:])
    assert np.array_equal(after.b[:, 4:], state.adapter[LAYER].b[:, 4:])


def test_unequal_ranks_lose_energy_even_when_nobody_learns() -> None:
    """Both factors are diluted, so a direction falls by the square of the share of those who hold it."""
    state = wide_state()
    after = idle(zero_pad(), state, MIXED_RANKS)
    assert energy_kept(after.adapter, state.adapter) < 0.5
    shares = np.asarray([np.mean([rank > index for rank in MIXED_RANKS]) for index in range(64)])
    before, diluted = (version.adapter[LAYER] for version in (state, after))
    assert np.allclose(diluted.b, before.b * shares, atol=1e-6)
    assert np.allclose(diluted.a, before.a * shares[:, None], atol=1e-6)
