"""Exact increments: nothing is lost, neither by unequal ranks nor by a lossy downlink nor by a small global rank."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError
from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.algebra import take
from edge_runtime.wire import codec
from server import aggregators
from server.aggregators.increment import increment
from server.aggregators.method import State, Update, fresh_state
from tests.server.merging import (
    LAYER,
    MIXED_RANKS,
    SHAPES,
    Dense,
    dense,
    energy_kept,
    idle,
    learnt_state,
    naive_increment,
    updates_from,
    wide_state,
)


def apart(after: State, before: State) -> float:
    """Relative distance of two global products, tails included."""
    names = before.adapter.shapes
    total = {
        name: dense(after.adapter, names)[name] + dense(after.tail, names)[name] - dense(before.adapter, names)[name]
        for name in names
    }
    norm = sum(float(np.sum(w**2)) for w in dense(before.adapter, names).values())
    return float(np.sqrt(sum(float(np.sum(w**2)) for w in total.values()) / norm))


@pytest.mark.parametrize("rounds", [1, 7])
def test_idle_rounds_change_nothing_however_unequal_the_ranks(rounds: int) -> None:
    state = wide_state()
    after = idle(increment(), state, MIXED_RANKS, rounds)
    assert apart(after, state) < 1e-6
    assert energy_kept(after.adapter, state.adapter) > 0.9999


@pytest.mark.parametrize("downlink", ["int8", "fp16"])
def test_idle_rounds_change_nothing_although_devices_decode_something_else(downlink: str) -> None:
    """The difference is taken against what was decoded, so the loss of the downlink cancels."""
    state = wide_state()
    sent = codec.decode(codec.encode(state.adapter, downlink))
    assert np.linalg.norm(dense(sent, sent.shapes)[LAYER] - dense(state.adapter, sent.shapes)[LAYER]) > 1e-4
    assert apart(idle(increment(), state, MIXED_RANKS, 5, downlink), state) < 1e-6


def test_directions_that_a_device_only_holds_are_not_touched_by_it() -> None:
    """A device that holds everything and trains the top slice moves the product by the change of that slice alone."""
    state = learnt_state(8)
    [update] = updates_from(state, increment(), [3])
    merged = increment().combine(state, [update]).state
    for layer, before in dense(state.adapter).items():
        moved = dense(update.trained)[layer] - dense(update.received)[layer]
        assert np.allclose(dense(merged.adapter)[layer] + dense(merged.tail)[layer], before + moved, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), rank=st.integers(2, 6))
def test_what_did_not_fit_comes_back_in_the_next_round(seed: int, rank: int) -> None:
    """With room in the tail nothing is lost: adapter and tail together follow the dense formula for ever."""
    method, state = increment(tail=20.0), learnt_state(rank)
    truth = dense(state.adapter)
    for number in range(3):
        updates = updates_from(state, method, [rank, rank], seed=seed + number, size=0.3)
        for layer in truth:
            truth[layer] = naive_increment(State(Adapter({}), Adapter({}), 0), updates, layer) + truth[layer]
        merged = method.combine(state, updates)
        state = merged.state
        assert all(report.lost <= 1e-6 * report.norm for report in merged.layers.values())
    assert any(pair.rank for pair in state.tail.values())
    for layer, wanted in truth.items():
        found = dense(state.adapter)[layer] + dense(state.tail)[layer]
        assert np.linalg.norm(found - wanted) < 5e-6 * np.linalg.norm(wanted)


def test_a_tail_that_became_important_returns_into_the_adapter() -> None:
    """Devices halve the leading directions; what had been cut off then leads, and is sent to devices again."""
    state = learnt_state(2)
    merged = increment().combine(state, updates_from(state, increment(), [2, 2], size=0.4)).state
    lost_direction = dense(merged.tail)[LAYER]
    received = Adapter({name: take(pair, range(pair.rank)) for name, pair in merged.adapter.items()})
    gone = Adapter({name: type(pair)(pair.a, pair.b * np.float32(0)) for name, pair in received.items()})
    after = increment().combine(merged, [Update("d", 1.0, received, gone)]).state
    assert np.linalg.norm(lost_direction) > 0.05
    assert np.allclose(dense(after.adapter)[LAYER], lost_direction, atol=1e-6)


def test_the_tail_is_as_wide_as_asked_and_the_rest_is_reported_as_lost() -> None:
    state = learnt_state(2)
    for width in (0.0, 0.5, 1.0):
        method = increment(tail=width)
        updates = updates_from(state, method, [2, 2, 2], size=0.5)
        merged = method.combine(state, updates)
        assert merged.state.tail.ranks == ({LAYER: 1, **dict.fromkeys(SHAPES, 1)} if width == 0.5 else
                                           dict.fromkeys(SHAPES, 2) if width else {})  # fmt: skip
        for layer, report in merged.layers.items():
            kept = dense(merged.state.adapter)[layer] + dense(merged.state.tail)[layer]
            missing = np.linalg.norm(naive_increment(state, updates, layer) - kept)
            assert report.lost == pytest.approx(missing, rel=1e-4)
            assert 0 < report.lost < report.truncated or width == 0.0


def test_fresh_directions_differ_from_version_to_version() -> None:
    """A direction that taught nothing is replaced by another; one that was learnt stays."""
    state = fresh_state(SHAPES, 6, seed=0)
    first = idle(increment(), state, [6])
    second = idle(increment(), first, [6])
    for layer in SHAPES:
        rows = [version.adapter[layer].a for version in (state, first, second)]
        assert all(np.linalg.matrix_rank(a) == 6 for a in rows)
        assert not np.allclose(rows[0], rows[1])
        assert not np.allclose(rows[1], rows[2])


def test_a_negative_tail_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"aggregator.tail must be 0 or more; found -1"):
        aggregators.build("increment", tail=-1)


def test_each_layer_has_weights_of_its_own_where_an_update_says_so() -> None:
    state, method = learnt_state(4), aggregators.build("increment")
    first, second = updates_from(state, method, [4, 4], weights=[3.0, 1.0])
    layers = dict.fromkeys(SHAPES, 1.0)

    told = method.combine(state, [replace(first, weight=9.0, weights={**layers, LAYER: 3.0}), second])

    assert dense(told.state.adapter)[LAYER] == pytest.approx(
        dense(method.combine(state, [first, second]).state.adapter)[LAYER], abs=1e-6
    )


def test_a_discount_scales_one_increment_and_not_the_others() -> None:
    state, method = learnt_state(4), aggregators.build("increment", tail=4.0)
    updates = updates_from(state, method, [4, 2])

    def moved(discount: float) -> Dense:
        after = method.combine(state, [replace(updates[0], discount=discount), updates[1]]).state
        both = {name: dense(after.adapter)[name] + dense(after.tail)[name] for name in SHAPES}
        return {name: both[name] - dense(state.adapter)[name] for name in SHAPES}

    own = {name: 0.5 * (moved(1.0)[name] + moved(1e-12)[name]) for name in SHAPES}
    for name, half in moved(0.5).items():
        assert half == pytest.approx(own[name], abs=1e-6)


def test_a_report_says_how_the_sum_was_taken_and_what_its_error_does_not_exceed() -> None:
    state, method = learnt_state(2), increment(tail=0.0)
    updates = updates_from(state, method, [2, 2, 2], size=0.5)
    for layer, report in method.combine(state, updates).layers.items():
        missing = np.linalg.norm(np.linalg.svd(naive_increment(state, updates, layer), compute_uv=False)[2:])
        assert report.how == "exact"
        # All devices had all of the version, so it cancels; what six trained directions came to is left.
        assert report.why.startswith("6 columns")
        assert missing <= report.bound <= missing * (1 + 1e-9)


def test_a_large_merge_is_sketched_and_keeps_its_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_runtime.lora.leading.SMALL", 0.0)
    monkeypatch.setattr("edge_runtime.lora.leading.WORTH", float("inf"))
    state, method = learnt_state(6), increment()
    updates = updates_from(state, method, [2, 4, 6, 6, 6, 6], size=0.05)
    merged = method.combine(state, updates)
    wanted = naive_increment(state, updates, LAYER)
    report, error = merged.layers[LAYER], np.linalg.norm(wanted - dense(merged.state.adapter)[LAYER])
    best = np.linalg.norm(np.linalg.svd(wanted, compute_uv=False)[6:])
    assert report.how == "sketch"
    assert best * (1 - 1e-6) <= error <= best * (1 + 1e-3)
    assert error <= report.bound
    assert report.truncated == pytest.approx(error, rel=0.5)
    assert method.combine(state, updates[::-1]).state.adapter.digest() == merged.state.adapter.digest()
