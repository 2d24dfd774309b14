"""FedIT and those that average one factor: how the first is biased, and what the others never touch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import AggregationError, ConfigError
from server import aggregators
from server.aggregators.fedit import fedit
from server.aggregators.method import Aggregator, State
from tests.server.merging import LAYER, SHAPES, dense, learnt_state, naive_svd, updates_from


def lives(method: Aggregator, rounds: int) -> list[State]:
    """The states of a fleet of three devices, from the first."""
    states = [method.init(SHAPES, 6, 0)]
    for number in range(rounds):
        states.append(method.combine(states[-1], updates_from(states[-1], method, [6] * 3, seed=number)).state)
    return states


@settings(max_examples=20, deadline=None)
@given(devices=st.integers(1, 4), rank=st.integers(1, 8), seed=st.integers(0, 2**16))
def test_the_bias_of_fedit_is_the_weighted_covariance_of_the_factors(devices: int, rank: int, seed: int) -> None:
    """Sum_k p_k B_k A_k - B A = sum_{j<k} p_j p_k (B_j - B_k)(A_j - A_k)."""
    state = learnt_state(rank)
    updates = updates_from(state, fedit(), [rank] * devices, seed=seed, size=0.5)
    total = sum(update.weight for update in updates)
    pairs = [(u.weight / total, u.trained[LAYER].a.astype(float), u.trained[LAYER].b.astype(float)) for u in updates]
    covariance = sum(
        (p * q * (b - d) @ (a - c) for (p, a, b), (q, c, d) in itertools.combinations(pairs, 2)),
        start=np.zeros((14, 18)),
    )
    bias = naive_svd(state, updates, LAYER) - dense(fedit().combine(state, updates).state.adapter)[LAYER]
    assert np.allclose(bias, covariance, atol=2e-6)
    assert devices == 1 or np.linalg.norm(covariance) > 0.01


def test_another_rank_is_refused_by_every_mean_of_factors() -> None:
    svd, state = aggregators.build("svd"), learnt_state(8)
    updates = updates_from(state, svd, [8, 4])
    for name, row in aggregators.METHODS.items():
        if aggregators.build(name).equal_ranks:
            with pytest.raises(AggregationError, match=r"needs rank 8 of every device, found 4; .*increment"):
                row.build().combine(state, updates)


def test_ffa_lora_never_changes_a_and_rolora_one_factor_at_a_time() -> None:
    first, *others = lives(aggregators.build("ffa_lora"), 3)
    assert all(np.array_equal(state.adapter[LAYER].a, first.adapter[LAYER].a) for state in others)
    states = lives(aggregators.build("rolora"), 4)
    for number, (before, after) in enumerate(itertools.pairwise(states), start=1):
        same = {f: np.array_equal(*(getattr(s.adapter[LAYER], f) for s in (before, after))) for f in ("a", "b")}
        assert same == {"a": number % 2 == 1, "b": number % 2 == 0}


def test_the_server_of_fedsa_lora_never_has_a_model() -> None:
    states = lives(aggregators.build("fedsa_lora"), 3)
    assert not any(state.adapter[LAYER].b.any() for state in states)
    assert not np.array_equal(states[0].adapter[LAYER].a, states[-1].adapter[LAYER].a)


@pytest.mark.parametrize(
    ("name", "other", "says"),
    [
        ("fedsa_lora", {"robust": "krum"}, "no products of updates, which robust = 'krum' judges"),
        ("ffa_lora", {"optimizer": "adam"}, "needs a factor that stays as it is, and optimizer = 'adam'"),
        ("rolora", {"robust": "median"}, "robust = 'median' makes both anew"),
        ("rolora", {"optimizer": "yogi"}, "take fedit"),
    ],
)
def test_what_would_move_the_factor_that_stays_is_refused(name: str, other: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        aggregators.build(name, **other)
