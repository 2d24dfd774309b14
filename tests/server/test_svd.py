"""FlexLoRA's merge: the factored result is the dense SVD's, and so is its rank collapse."""

from __future__ import annotations

import numpy as np
import pytest

from server.aggregators.svd import svd
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


@pytest.mark.parametrize("ranks", [(4, 4), (2, 6, 10), (1,)])
def test_the_factors_are_those_of_the_dense_svd(ranks: tuple[int, ...]) -> None:
    """The paper forms the dense mean and decomposes it; the product of its leading directions is ours."""
    state = learnt_state(4)
    updates = updates_from(state, svd(), ranks, size=0.3)
    merged = svd().combine(state, updates).state
    u, s, vt = np.linalg.svd(naive_svd(state, updates, LAYER))
    wanted = (u[:, :4] * s[:4]) @ vt[:4]
    assert np.allclose(dense(merged.adapter)[LAYER], wanted, atol=1e-6)
    assert np.allclose(np.linalg.norm(merged.adapter[LAYER].b, axis=0) * 3**-0.5, s[:4], atol=1e-6)


def test_what_is_truncated_is_lost() -> None:
    state = learnt_state(3)
    merged = svd().combine(state, updates_from(state, svd(), [8, 8], size=0.5))
    assert not merged.state.tail
    assert all(report.lost == report.truncated > 0 for report in merged.layers.values())


def test_unequal_ranks_lose_energy_even_when_nobody_learns() -> None:
    """Rank collapse: a direction is multiplied by the share of the devices that hold it, in every round."""
    state = wide_state()
    once, often = (energy_kept(idle(svd(), state, MIXED_RANKS, n).adapter, state.adapter) for n in (1, 5))
    assert once < 0.6
    assert often < once / 1.5
    before, after = (
        np.linalg.norm(version.adapter[LAYER].b, axis=0) for version in (state, idle(svd(), state, MIXED_RANKS))
    )
    shares = np.asarray([np.mean([rank > index for rank in MIXED_RANKS]) for index in range(64)])
    assert np.allclose(after, shares * before, rtol=1e-4)
