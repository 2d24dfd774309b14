"""Methods with a frozen adapter beside the base: sums are exact up to what its rank cannot hold, round after round."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError
from edge_runtime.lora.adapter import Adapter, Deferred
from server import aggregators
from server.aggregators.beside import BESIDE, published
from server.aggregators.method import Aggregator, State, load_state, save_state
from tests.server.merging import (
    LAYER,
    NAIVE,
    SHAPES,
    dense,
    idle,
    model,
    naive_mean_of_factors,
    naive_svd,
    updates_from,
)

HOLDING = sorted(name for name in aggregators.METHODS if aggregators.build(name).beside)
every_one = pytest.mark.parametrize("name", HOLDING)


def life(method: Aggregator, rounds: int, *, size: float = 0.3, first: State | None = None) -> list[State]:
    states = [first or method.init(SHAPES, 4, 0)]
    for number in range(rounds):
        updates = updates_from(states[-1], method, [4, 2, 3], seed=number, size=size)
        states.append(method.combine(states[-1], updates).state)
    return states


def test_those_are_they() -> None:
    assert HOLDING == ["fedex_lora", "flora", "florist"]


@every_one
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), beside=st.integers(1, 20))
def test_over_rounds_the_model_is_the_formulas_but_for_what_is_reported(name: str, seed: int, beside: int) -> None:
    method = aggregators.build(name, beside=beside)
    state = life(method, 2)[-1]
    updates = updates_from(state, method, [4, 2, 3], seed=seed, size=0.3)
    merged = method.combine(state, updates)
    for layer, report in merged.layers.items():
        wanted = NAIVE[name](state, updates, layer)
        missing = float(np.linalg.norm(wanted - dense(model(merged.state))[layer]))
        scale = float(np.linalg.norm(wanted))
        if name == "florist":  # its threshold drops something more, which the formula drops too
            assert missing <= report.lost + 1e-5 * scale
        else:
            assert report.lost == pytest.approx(missing, abs=1e-5 * scale)
        assert report.truncated == report.lost <= report.bound + 1e-5 * scale


@every_one
def test_the_frozen_adapter_keeps_its_rank_and_comes_first(name: str) -> None:
    method = aggregators.build(name, beside=5)
    for state in life(method, 3):
        assert state.carried[BESIDE].ranks == dict.fromkeys(SHAPES, 5)
        assert state.adapter.ranks == dict.fromkeys(SHAPES, 4)
        assert not state.tail
        whole = published(state)
        assert np.array_equal(whole[LAYER].b[:, :5], state.carried[BESIDE][LAYER].b)
        assert np.array_equal(whole[LAYER].a[5:], state.adapter[LAYER].a)
        assert save_state(load_state(save_state(state))) == save_state(state)


@every_one
def test_idle_rounds_change_nothing(name: str) -> None:
    method = aggregators.build(name)
    state = life(method, 2)[-1]
    after = idle(method, state, [4, 2, 3], rounds=3)
    for layer, wanted in dense(model(state)).items():
        assert np.allclose(dense(model(after))[layer], wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["flora", "florist"])
def test_every_round_begins_anew_in_other_directions(name: str) -> None:
    first, second, third = life(aggregators.build(name), 2)
    for state in (first, second, third):
        assert not state.adapter[LAYER].b.any()
    assert not np.allclose(first.adapter[LAYER].a, second.adapter[LAYER].a)
    assert not np.allclose(second.adapter[LAYER].a, third.adapter[LAYER].a)


def test_fedex_goes_on_from_the_mean_of_factors_and_the_whole_is_the_mean_of_products() -> None:
    method = aggregators.build("fedex_lora")
    state = life(method, 1)[-1]
    before = dense(state.carried[BESIDE])[LAYER]
    updates = updates_from(state, method, [4, 4, 4], seed=7, size=0.3)
    merged = method.combine(state, updates).state
    assert np.allclose(dense(merged.adapter)[LAYER], naive_mean_of_factors(state, updates, LAYER), atol=1e-5)
    assert np.allclose(dense(model(merged))[LAYER], before + naive_svd(state, updates, LAYER), atol=1e-5)
    assert np.linalg.norm(dense(merged.carried[BESIDE])[LAYER] - before) > 0.01


def test_florist_keeps_the_fewest_directions_that_hold_the_share() -> None:
    state = aggregators.build("florist").init(SHAPES, 4, 0)
    updates = updates_from(state, aggregators.build("florist"), [4, 4, 4], size=0.3)
    kept = {tau: aggregators.build("florist", tau=tau).combine(state, updates).layers[LAYER] for tau in (0.2, 0.9, 1.0)}
    directions = [int(report.why.split()[0]) for report in kept.values()]
    assert directions == sorted(directions)
    assert directions[0] < directions[-1]
    lost = [report.lost / np.linalg.norm(NAIVE["flora"](state, updates, LAYER)) for report in kept.values()]
    assert lost[0] ** 2 <= 0.8
    assert lost[1] ** 2 <= 0.1
    assert lost[2] < 1e-6


def test_a_state_on_the_disk_is_published_layer_by_layer() -> None:
    state, asked = life(aggregators.build("flora"), 1)[-1], []

    def made(name: str) -> object:
        asked.append(name)
        return state.adapter[name]

    below = replace(state, adapter=Adapter(Deferred(state.adapter.sizes, made)))  # type: ignore[arg-type]
    whole = published(below)
    assert not asked
    assert whole.digest() == published(state).digest()


@every_one
def test_bad_parameters_and_server_optimisers_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="beside must be at least 1; found 0"):
        aggregators.build(name, beside=0)
    with pytest.raises(ConfigError, match="has a frozen adapter, of which optimizer = 'adam' knows nothing"):
        aggregators.build(name, optimizer="adam")


@pytest.mark.parametrize("tau", [0.0, 1.5])
def test_a_share_that_is_none_is_refused(tau: float) -> None:
    with pytest.raises(ConfigError, match="tau must be above 0"):
        aggregators.build("florist", tau=tau)
