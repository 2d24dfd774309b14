"""Fed-SB: the mean of cores is exact over devices of unequal rank, and nothing but `b` ever changes."""

from __future__ import annotations

import numpy as np

from server.aggregators.fed_sb import fed_sb
from tests.server.merging import LAYER, dense, learnt_state, mean, updates_from

CORE = {LAYER: (6, 6)}


def test_cores_of_unequal_rank_add_up_to_the_mean_of_their_products() -> None:
    """And `a` is a square of orthogonal rows, so any core can be written as b a."""
    state = fed_sb().init(CORE, 6, 0)
    a = state.adapter[LAYER].a.astype(float)
    assert np.allclose(a @ a.T, np.eye(6) / 3, atol=1e-6)
    for number in range(3):
        updates = updates_from(state, fed_sb(), [6, 2, 4], seed=number, size=0.3)
        moved = mean(updates, LAYER, lambda u: dense(u.trained, CORE)[LAYER] - dense(u.received, CORE)[LAYER])
        wanted = dense(state.adapter, CORE)[LAYER] + moved
        state = fed_sb().combine(state, updates).state
        assert np.allclose(dense(state.adapter, CORE)[LAYER], wanted, atol=1e-6)
        assert np.array_equal(state.adapter[LAYER].a, a.astype(np.float32))


def test_what_a_device_does_not_train_stays_whatever_its_share() -> None:
    state = learnt_state(6, shapes=CORE)
    updates = updates_from(state, fed_sb(), [2], size=0.3, weights=[100.0])
    after = fed_sb().combine(state, updates).state.adapter[LAYER]
    assert np.array_equal(after.b[:, 2:], state.adapter[LAYER].b[:, 2:])
    assert not np.allclose(after.b[:, :2], state.adapter[LAYER].b[:, :2])
