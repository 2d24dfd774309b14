"""Laws that hold for every method of the table, whatever it computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save

from edge_runtime.errors import AggregationError, ConfigError
from edge_runtime.lora.adapter import Adapter, Pair, Slot
from edge_runtime.lora.algebra import cut
from server import aggregators
from server.aggregators.method import Aggregator, Merged, State, Update, load_state, save_state
from tests.server.merging import (
    LAYER,
    NAIVE,
    SHAPES,
    dense,
    frozen,
    idle,
    learnt_state,
    model,
    rank_for,
    slot_for,
    updates_from,
)

every_method = pytest.mark.parametrize("name", sorted(aggregators.METHODS))
exact_method = pytest.mark.parametrize(
    "name", sorted(name for name in aggregators.METHODS if aggregators.build(name).exact)
)
ROUNDING = 2e-6
"""Of float32 factors, relative to the norm of the product."""

fleets = st.lists(st.integers(1, 10), min_size=1, max_size=5)
seeds = st.integers(0, 2**16)


def relative(found: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(found - wanted)) / max(float(np.linalg.norm(wanted)), 1e-30)


def without(update: Update, layer: str) -> Update:
    """The update of a device that did not train a layer."""
    return replace(update, trained=Adapter({n: pair for n, pair in update.trained.items() if n != layer}))


def only(state: State, layer: str) -> State:
    return State(Adapter({layer: state.adapter[layer]}), Adapter({}), state.version)


def test_every_method_has_a_naive_reference() -> None:
    assert set(NAIVE) == set(aggregators.METHODS)


# ── order, purity, files ──────────────────────────────────────────────────────────────────────────────────────────


@every_method
@settings(max_examples=20, deadline=None)
@given(ranks=fleets, seed=seeds, data=st.data())
def test_order_of_arrival_leaves_no_trace(name: str, ranks: list[int], seed: int, data: st.DataObject) -> None:
    method, state = aggregators.build(name), learnt_state(8)
    updates = updates_from(state, method, ranks, seed=seed)
    shuffled = data.draw(st.permutations(updates))
    assert save_state(method.combine(state, shuffled).state) == save_state(method.combine(state, updates).state)


@every_method
def test_updates_are_consumed_once_and_nothing_given_is_changed(name: str) -> None:
    method, state = aggregators.build(name), learnt_state(8)
    updates = updates_from(state, method, [2, 8])
    before = save_state(state), [(u.received.digest(), u.trained.digest()) for u in updates]
    streamed = method.combine(state, iter(updates))
    assert (save_state(state), [(u.received.digest(), u.trained.digest()) for u in updates]) == before
    assert save_state(streamed.state) == save_state(method.combine(state, updates).state)
    assert streamed.state.version == state.version + 1


@every_method
@settings(max_examples=20, deadline=None)
@given(ranks=fleets, seed=seeds, rank=st.integers(1, 12))
def test_a_state_round_trips_bit_for_bit_and_merges_on_as_before(
    name: str, ranks: list[int], seed: int, rank: int
) -> None:
    method = aggregators.build(name)
    first = method.combine(learnt_state(rank), updates_from(learnt_state(rank), method, ranks, seed=seed)).state
    again = load_state(save_state(first))
    assert again.version == first.version
    assert again.adapter.digest() == first.adapter.digest()
    assert again.tail.digest() == first.tail.digest()
    updates = updates_from(first, method, ranks, seed=seed + 1)
    assert save_state(method.combine(again, updates).state) == save_state(method.combine(first, updates).state)


def test_what_is_carried_beside_the_method_round_trips() -> None:
    state = replace(learnt_state(4), carried={"momentum": learnt_state(2).adapter})
    again = load_state(save_state(state))
    assert {name: part.digest() for name, part in again.carried.items()} == {
        "momentum": state.carried["momentum"].digest()
    }
    assert again.adapter.digest() == state.adapter.digest()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_state_is_refused_or_whole(data: st.DataObject) -> None:
    payload = save_state(learnt_state(2))
    cut_at = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(AggregationError, match="restore the store"):
        load_state(payload[:cut_at])


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"version": np.zeros(0, np.int64)},
        {"version": np.zeros(1, np.int64), "adapter:q:a": np.zeros((2, 3), np.float32)},
        {"version": np.zeros(1, np.int64), "other:q:a": np.zeros((2, 3), np.float32)},
        {"version": np.zeros(1, np.int64), "q": np.zeros((2, 3), np.float32)},
        {
            "version": np.zeros(1, np.int64),
            "adapter:q:a": np.zeros((2, 3), np.float64),
            "adapter:q:b": np.zeros((4, 2), np.float64),
        },
    ],
    ids=["empty", "empty version", "half a pair", "unknown part", "unknown name", "not float32"],
)
def test_tensors_that_are_no_state_are_refused(tensors: dict[str, NDArray[np.generic]]) -> None:
    with pytest.raises(AggregationError, match="does not load"):
        load_state(save(tensors))


# ── what a device receives ────────────────────────────────────────────────────────────────────────────────────────


@every_method
@given(seed=seeds, rank=st.integers(1, 20))
@settings(max_examples=10, deadline=None)
def test_the_first_state_changes_nothing_and_is_decided_by_its_seed(name: str, seed: int, rank: int) -> None:
    method = aggregators.build(name)
    state = method.init(SHAPES, rank, seed)
    assert state.adapter.ranks == {layer: min(rank, *shape) for layer, shape in SHAPES.items()}
    assert all(not product.any() for product in dense(state.adapter).values())
    assert all(np.linalg.matrix_rank(pair.a) == pair.rank for pair in state.adapter.values())
    assert save_state(method.init(SHAPES, rank, seed)) == save_state(state)
    assert save_state(method.init(SHAPES, rank, seed + 1)) != save_state(state)


@every_method
@given(ranks=st.lists(st.integers(0, 12), min_size=2, max_size=2), more=st.integers(0, 4))
@settings(max_examples=20, deadline=None)
def test_a_device_receives_the_first_directions_that_it_holds(name: str, ranks: list[int], more: int) -> None:
    method, state = aggregators.build(name), learnt_state(8)
    held = dict(zip(SHAPES, (rank + more for rank in ranks), strict=True))
    layers = {
        layer: slot_for(SHAPES, rank, rank + more).layers[layer] for layer, rank in zip(SHAPES, ranks, strict=True)
    }
    received = method.fit(state.adapter, Slot(layers))
    for layer, rank in held.items():
        if not min(rank, *SHAPES[layer]):
            assert layer not in received
            continue
        expected = cut(state.adapter[layer], min(rank, *SHAPES[layer]))
        assert np.array_equal(received[layer].a, expected.a)
        assert np.array_equal(received[layer].b, expected.b)


@every_method
@settings(max_examples=20, deadline=None)
@given(rank=st.integers(1, 10), seed=seeds)
def test_one_device_alone_gets_back_what_it_sent(name: str, rank: int, seed: int) -> None:
    """Where there is a threshold, all of it is above."""
    method = aggregators.build(name, tau=1.0) if name == "florist" else aggregators.build(name)
    state = method.init(SHAPES, 10, 0)
    [update] = updates_from(state, method, [rank], seed=seed)
    merged = method.combine(state, [update]).state
    received = dense(method.fit(merged.adapter, slot_for(SHAPES, rank_for(method, state, rank))))
    for layer, wanted in dense(update.trained).items():
        assert relative(received[layer] + frozen(merged, layer), wanted) < ROUNDING


@every_method
def test_devices_that_hold_all_and_learn_nothing_leave_everything_as_it_was(name: str) -> None:
    method, state = aggregators.build(name), learnt_state(8)
    after = idle(method, state, [8, 8, 8], rounds=3)
    for layer, wanted in dense(state.adapter).items():
        assert relative(dense(model(after))[layer], wanted) < ROUNDING


# ── who has a say, and how much ───────────────────────────────────────────────────────────────────────────────────


@every_method
def test_a_device_that_did_not_train_a_layer_has_no_say_in_it(name: str) -> None:
    method, state = aggregators.build(name), learnt_state(8)
    whole, part = updates_from(state, method, [4, 8])
    part = without(part, LAYER)
    merged = method.combine(state, [whole, part])
    alone = method.combine(state, [whole])
    assert np.array_equal(dense(model(merged.state))[LAYER], dense(model(alone.state))[LAYER])
    assert merged.layers[LAYER].updates == 1
    other = next(layer for layer in SHAPES if layer != LAYER)
    assert merged.layers[other].updates == 2
    assert not np.allclose(dense(model(merged.state))[other], dense(model(alone.state))[other])


@every_method
def test_a_layer_that_nobody_trained_stays_as_it_is(name: str) -> None:
    method, state = aggregators.build(name), learnt_state(8)
    merged = method.combine(state, [without(update, LAYER) for update in updates_from(state, method, [4, 8])])
    assert only(merged.state, LAYER).adapter.digest() == only(state, LAYER).adapter.digest()
    assert LAYER not in merged.layers


@every_method
def test_only_the_ratio_of_weights_matters_and_a_weight_counts_like_so_many_devices(name: str) -> None:
    method, state = aggregators.build(name), learnt_state(8)
    updates = updates_from(state, method, [4, 8], weights=[1.0, 3.0])
    wanted = dense(model(method.combine(state, updates).state))
    larger = [replace(update, weight=7 * update.weight) for update in updates]
    split = [updates[0], *(replace(updates[1], weight=1.0, client=f"copy-{n}") for n in range(3))]
    for others in (larger, split) if method.weighs else (larger,):
        for layer, product in dense(model(method.combine(state, others).state)).items():
            assert relative(product, wanted[layer]) < ROUNDING


# ── exactness ─────────────────────────────────────────────────────────────────────────────────────────────────────


@every_method
@settings(max_examples=25, deadline=None)
@given(ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3), seed=seeds, size=st.sampled_from([0.0, 0.01, 1.0]))
def test_a_merge_equals_its_formula_when_the_rank_suffices(name: str, ranks: list[int], seed: int, size: float) -> None:
    """The naive dense formula, up to the rounding of float32 factors."""
    method = aggregators.build(name)
    state = learnt_state(18)  # as wide as the layers
    updates = updates_from(state, method, ranks, seed=seed, size=size, weights=[1.0 + seed % 7, 2.0, 5.0][: len(ranks)])
    merged = method.combine(state, updates)
    for layer, product in dense(model(merged.state)).items():
        assert relative(product, NAIVE[name](state, updates, layer)) < ROUNDING
        if method.beside and not method.exact:
            continue  # what is below its threshold is truncated
        if not method.exact and sum(update.trained[layer].rank for update in updates) > state.adapter[layer].rank:
            continue  # both sides of a sum may need more directions than it has rank
        assert merged.layers[layer].truncated <= ROUNDING * merged.layers[layer].norm
        assert merged.layers[layer].lost <= ROUNDING * merged.layers[layer].norm


@exact_method
@settings(max_examples=25, deadline=None)
@given(ranks=fleets, seed=seeds, rank=st.integers(1, 9))
def test_what_does_not_fit_is_reported_exactly(name: str, ranks: list[int], seed: int, rank: int) -> None:
    """The reported truncation error is the measured distance from the dense formula; the rank is kept."""
    if aggregators.build(name).beside:
        return  # what does not fit there is that of another rank: see test_beside
    method, state = aggregators.build(name), learnt_state(rank)
    updates = updates_from(state, method, ranks, seed=seed)
    merged = method.combine(state, updates)
    assert merged.state.adapter.ranks == state.adapter.ranks
    for layer, report in merged.layers.items():
        wanted = NAIVE[name](state, updates, layer)
        missing = np.linalg.norm(wanted - dense(model(merged.state))[layer])
        best = np.linalg.norm(np.linalg.svd(wanted, compute_uv=False)[rank:])
        scale = float(np.linalg.norm(wanted))
        assert report.norm == pytest.approx(scale, rel=1e-6)
        assert report.truncated == pytest.approx(missing, abs=ROUNDING * scale)
        assert report.truncated == pytest.approx(best, abs=ROUNDING * scale), "no adapter of that rank is nearer"
        assert report.lost <= report.truncated * (1 + 1e-9)


def test_truncation_of_all_layers_is_relative_to_all_that_was_merged() -> None:
    method, state = aggregators.build("svd"), learnt_state(2)
    merged = method.combine(state, updates_from(state, method, [6, 6], size=0.5))
    cut_off = sum(report.truncated**2 for report in merged.layers.values())
    assert merged.truncation == pytest.approx((cut_off / sum(r.norm**2 for r in merged.layers.values())) ** 0.5)
    assert 0 < merged.truncation < 1
    assert Merged(state, {}).truncation == 0.0


# ── errors ────────────────────────────────────────────────────────────────────────────────────────────────────────


def reshaped(update: Update, pair: Pair, layer: str = LAYER) -> Update:
    return replace(update, trained=Adapter({**update.trained, layer: pair}))


def zeros(d_out: int, d_in: int, rank: int) -> Pair:
    return Pair(np.zeros((rank, d_in), np.float32), np.zeros((d_out, rank), np.float32))


def merge(method: Aggregator, state: State, *updates: Update) -> Merged:
    return method.combine(state, updates)


@every_method
def test_updates_that_do_not_fit_are_refused_with_layer_shapes_and_device(name: str) -> None:
    method, state = aggregators.build(name), learnt_state(8)
    good, other = updates_from(state, method, [4, 4])
    with pytest.raises(AggregationError, match="at least one update; found none"):
        merge(method, state)
    with pytest.raises(AggregationError, match="found two of 'device-0'"):
        merge(method, state, good, other, good)
    with pytest.raises(AggregationError, match=r"'device-0' trained layer 'lm_head', which the fleet does not have"):
        merge(method, state, other, reshaped(good, zeros(4, 4, 2), layer="lm_head"))
    with pytest.raises(
        AggregationError,
        match=rf"layer '{LAYER}' of 'device-0': expected \(14, 18\) at rank [48], found \(14, 19\) at rank 4",
    ):
        merge(method, state, other, reshaped(good, zeros(14, 19, 4)))
    with pytest.raises(AggregationError, match=rf"'{LAYER}' of 'device-0': expected .* at rank \d, found .* at rank 5"):
        merge(method, state, other, reshaped(good, zeros(14, 18, 5)))


@every_method
@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_is_a_positive_number(name: str, weight: float) -> None:
    method, state = aggregators.build(name), learnt_state(8)
    good, other = updates_from(state, method, [4, 4])
    with pytest.raises(AggregationError, match=r"'device-1' weighs .*positive count"):
        merge(method, state, good, replace(other, weight=weight))


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError,
        match=r"unknown aggregation method 'fedavg'; expected one of: fed_sb, .*, zero_pad",
    ):
        aggregators.build("fedavg")


@every_method
def test_a_parameter_that_a_method_does_not_take_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"method '{name}'.*'momentum'"):
        aggregators.build(name, momentum=0.9)


@every_method
def test_devices_may_hold_more_than_they_train_only_where_that_costs_nothing(name: str) -> None:
    """Whoever averages all that a device holds may not let it hold what it does not return."""
    method, state = aggregators.build(name), learnt_state(8)
    after = dense(model(idle(method, state, [2, 4, 8])))
    apart = max(relative(after[layer], wanted) for layer, wanted in dense(state.adapter).items())
    assert (apart < ROUNDING) == aggregators.METHODS[name].idle
    assert not method.hold_more or aggregators.METHODS[name].idle
    assert all(method.server_rank(rank) >= rank for rank in (1, 7, 64))


@pytest.mark.parametrize("name", sorted(n for n in aggregators.METHODS if not aggregators.build(n).of_factors))
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_a_method_of_products_does_not_see_in_which_factors_they_come(name: str, seed: int) -> None:
    method, state, draw = aggregators.build(name), learnt_state(8), np.random.default_rng(seed)
    updates = updates_from(state, method, [4, 8, 2], seed=seed)
    turned = [replace(u, trained=Adapter({n: other_factors(p, draw) for n, p in u.trained.items()})) for u in updates]
    wanted, found = (dense(model(method.combine(state, given).state)) for given in (updates, turned))
    assert all(relative(found[layer], product) < 20 * ROUNDING for layer, product in wanted.items())


def other_factors(pair: Pair, draw: np.random.Generator) -> Pair:
    """The same product in other factors, neither orthogonal nor balanced."""
    turn = np.linalg.qr(draw.standard_normal((pair.rank, pair.rank)))[0] * draw.uniform(0.5, 2.0, pair.rank)
    a, b = np.linalg.inv(turn) @ pair.a.astype(float), pair.b.astype(float) @ turn
    return Pair(a.astype(np.float32), b.astype(np.float32))
