"""Laws of every robust rule over every method, and each rule against its formula on dense matrices."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_runtime.errors import AggregationError, ConfigError
from edge_runtime.lora.adapter import Adapter, Pair
from server import aggregators
from server.aggregators.method import State, Update, save_state
from server.aggregators.robust import ROBUST
from server.aggregators.robust.form import canonical, scaled
from server.aggregators.robust.geometric_median import geometric_median
from server.aggregators.robust.geometry import increments, squared_distances
from server.aggregators.robust.krum import scores
from tests.runtime.toy import optimum
from tests.server.bench import GOAL, Bench, Hand, training
from tests.server.merging import JUDGED, LAYER, RULED, SHAPES, STEPPED, dense, learnt_state, model, updates_from
from tests.strategies import gaussian

every_rule = pytest.mark.parametrize("rule", sorted(ROBUST))
every_method = pytest.mark.parametrize("name", RULED)
seeds = st.integers(0, 2**16)
RANKS = (2, 3, 8, 4, 8, 2, 5, 8, 6, 4)
"""Ten devices; three of them may be bad."""
BAD = 3
Vector = NDArray[np.float64]


def vector(update: Update) -> Vector:
    """A device's increment, all layers as one dense vector."""
    before, after = dense(update.received), dense(update.trained)
    return np.concatenate([update.discount * (after[name] - before[name]).ravel() for name in SHAPES])


def products(adapter: Adapter) -> Vector:
    return np.concatenate([product.ravel() for product in dense(adapter).values()])


def poisoned(updates: Sequence[Update], scale: float, count: int = BAD) -> list[Update]:
    """The last devices move that far in one direction of their own choice, and claim many examples."""
    bad = []
    for update in updates[-count:]:
        moved = {
            name: Pair(pair.a, (pair.b + scale * gaussian(pair.shape, pair.rank, 1).b).astype(np.float32))
            for name, pair in update.trained.items()
        }
        bad.append(replace(update, trained=Adapter(moved), weight=100.0))
    return [*updates[:-count], *bad]


def moved(name: str, state: State, updates: Sequence[Update], **parameters: object) -> Vector:
    """How far a merge moves the global product, its tail included."""
    after = aggregators.build(name, **parameters).combine(state, updates).state  # type: ignore[arg-type]
    return products(model(after)) + products(after.tail) - products(model(state))


def regauged(pair: Pair, by: NDArray[np.float64]) -> Pair:
    """The same product by other factors."""
    return Pair((np.linalg.inv(by) @ pair.a).astype(np.float32), (pair.b @ by).astype(np.float32))


# ── laws ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@every_rule
def test_a_rule_names_its_source(rule: str) -> None:
    described = sys.modules[ROBUST[rule].__module__].__doc__ or ""
    assert re.search(r"^Source: \S", described, re.MULTILINE)


@every_rule
@every_method
@settings(max_examples=5, deadline=None)
@given(seed=seeds, data=st.data())
def test_order_of_arrival_leaves_no_trace(rule: str, name: str, seed: int, data: st.DataObject) -> None:
    state, method = learnt_state(8), aggregators.build(name, robust=rule)
    updates = updates_from(state, method, RANKS[:6], seed=seed)
    found, other = (method.combine(state, given) for given in (updates, data.draw(st.permutations(updates))))
    assert save_state(found.state) == save_state(other.state)
    assert found.excluded == other.excluded


@every_rule
@pytest.mark.parametrize("name", sorted({*STEPPED} & {*JUDGED}))
@settings(max_examples=5, deadline=None)
@given(seed=seeds)
def test_the_factorisation_that_a_device_sends_has_no_effect(rule: str, name: str, seed: int) -> None:
    """Also on a method that averages factors, and also if it is far from balanced."""
    state, draw = learnt_state(8), np.random.default_rng(seed)
    updates = updates_from(state, aggregators.build(name), RANKS[:6], seed=seed)
    other = []
    for update in updates:
        # The received slice is the server's: where factors are averaged, it stays as it was sent.
        parts = {}
        for part in ("trained", "received"):
            adapter: Adapter = getattr(update, part)
            parts[part] = Adapter(
                {
                    layer: pair
                    if part == "received" and aggregators.build(name).of_factors
                    else regauged(pair, np.linalg.qr(draw.standard_normal((pair.rank, pair.rank)))[0] * 3)
                    for layer, pair in adapter.items()
                }
            )
        other.append(replace(update, trained=parts["trained"], received=parts["received"]))
    wanted, found = (moved(name, state, given, robust=rule) for given in (updates, other))
    assert np.linalg.norm(found - wanted) < 1e-4 * np.linalg.norm(products(state.adapter))


@every_rule
@every_method
def test_a_round_in_which_nobody_learns_changes_nothing(rule: str, name: str) -> None:
    """With equal ranks: with unequal ones some methods shrink by themselves."""
    state = learnt_state(8)
    updates = updates_from(state, aggregators.build(name), [8] * 5, size=0.0)
    assert np.linalg.norm(moved(name, state, updates, robust=rule)) < 1e-5 * np.linalg.norm(products(state.adapter))


def test_two_halves_of_a_device_count_as_the_whole_under_a_fixed_bound() -> None:
    state = learnt_state(18)
    updates = updates_from(state, aggregators.build("increment"), [4, 8, 2])
    split = [*updates[:-1], *(replace(updates[-1], client=f"half-{n}", weight=updates[-1].weight / 2) for n in "ab")]
    wanted, found = (moved("increment", state, given, robust="clip", max_norm=0.5) for given in (updates, split))
    assert np.allclose(found, wanted, atol=1e-5)


# ── bounded influence ─────────────────────────────────────────────────────────────────────────────────────────────


def honest_spread(updates: Sequence[Update]) -> tuple[Vector, float, float, float]:
    """Mean of the honest increments; the largest distance from it, between two of them, and the largest norm."""
    honest = [vector(update) for update in updates[:-BAD]]
    middle = np.mean(honest, axis=0)
    radius = max(float(np.linalg.norm(one - middle)) for one in honest)
    apart = max(float(np.linalg.norm(x - y)) for x, y in itertools.combinations(honest, 2))
    return middle, radius, apart, max(float(np.linalg.norm(one)) for one in honest)


def bound(rule: str, spread: tuple[Vector, float, float, float]) -> float:
    """How far from the honest mean each rule's result may be, as its module states it."""
    _, radius, apart, longest = spread
    count = len(RANKS)
    krum = (float(np.sqrt(count - BAD - 2)) + 1) * apart
    return {
        "krum": krum,
        "multi_krum": krum,
        "geometric_median": 2 * (count - BAD) / (count - 2 * BAD) * radius,
        "clip": 2 * longest,
        "trimmed_mean": float(np.sqrt(count - BAD)) * radius,
        "median": float(np.sqrt((count - BAD) / (count / 2 - BAD))) * radius,
    }[rule]


@every_rule
@settings(max_examples=6, deadline=None)
@given(seed=seeds, power=st.integers(0, 8))
def test_three_bad_devices_of_ten_move_the_result_by_a_bounded_amount(rule: str, seed: int, power: int) -> None:
    state = learnt_state(18)
    honest = updates_from(state, aggregators.build("increment"), RANKS, seed=seed)
    updates = poisoned(honest, 10.0**power)
    spread = honest_spread(updates)
    found = moved("increment", state, updates, robust=rule, byzantine=BAD)
    assert np.linalg.norm(found - spread[0]) <= 1.001 * bound(rule, spread)


@every_rule
def test_the_plain_mean_has_no_such_bound(rule: str) -> None:
    state = learnt_state(18)
    updates = poisoned(updates_from(state, aggregators.build("increment"), RANKS), 1e4)
    spread = honest_spread(updates)
    assert np.linalg.norm(moved("increment", state, updates) - spread[0]) > 10 * bound(rule, spread)


@every_rule
@every_method
def test_how_far_the_bad_devices_go_makes_no_difference_in_size(rule: str, name: str) -> None:
    """Over every method: the result at 1e8 is no larger than what the honest products and the rule allow."""
    state = learnt_state(8)
    honest = updates_from(state, aggregators.build(name), [8] * 10)
    spread = honest_spread(poisoned(honest, 1e8))
    largest = max(float(np.linalg.norm(products(update.trained))) for update in honest)
    found = moved(name, state, poisoned(honest, 1e8), robust=rule, byzantine=BAD)
    assert np.linalg.norm(found) <= 2 * largest + bound(rule, spread)


@every_rule
def test_a_mean_of_factors_is_not_ruined_by_a_product_that_looks_like_the_others(rule: str) -> None:
    state = learnt_state(8)
    updates = updates_from(state, aggregators.build("zero_pad"), [8] * 5)
    hidden = Adapter({layer: regauged(pair, 1e6 * np.eye(pair.rank)) for layer, pair in updates[0].trained.items()})
    attacked = [replace(updates[0], trained=hidden), *updates[1:]]
    wanted = moved("zero_pad", state, updates, robust=rule)
    assert np.linalg.norm(moved("zero_pad", state, attacked, robust=rule) - wanted) < 1e-4
    assert np.linalg.norm(moved("zero_pad", state, attacked) - moved("zero_pad", state, updates)) > 100


# ── each rule against its formula ─────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=15, deadline=None)
@given(seed=seeds, size=st.sampled_from([1e-4, 0.1, 1.0]))
def test_distances_and_scores_are_those_of_dense_vectors(seed: int, size: float) -> None:
    state = learnt_state(8)
    updates = updates_from(state, aggregators.build("increment"), RANKS, seed=seed, size=size)
    updates[1] = replace(updates[1], discount=0.5)
    found, points = increments(updates), np.stack([vector(update) for update in updates])
    wanted = np.sum((points[:, None] - points[None]) ** 2, axis=-1)
    assert np.allclose(squared_distances(found), wanted, rtol=1e-6, atol=1e-9 * wanted.max())
    assert np.allclose(found.norms, np.linalg.norm(points, axis=1), rtol=1e-7)
    others = np.sort(np.where(np.eye(len(points)) > 0, np.inf, wanted), axis=1)[:, : len(points) - BAD - 2]
    assert np.allclose(scores(found, BAD), others.sum(axis=1), rtol=1e-6)


def test_devices_of_different_layers_are_compared_on_the_common_ones_scaled_to_all() -> None:
    state = learnt_state(8)
    updates = updates_from(state, aggregators.build("increment"), [4, 4, 4, 4])
    other = next(layer for layer in SHAPES if layer != LAYER)
    updates[0] = replace(updates[0], trained=Adapter({LAYER: updates[0].trained[LAYER]}))
    updates[1] = replace(updates[1], trained=Adapter({other: updates[1].trained[other]}))
    changes = [
        {name: dense(update.trained)[name] - dense(update.received)[name] for name in update.trained}
        for update in updates
    ]
    energy = {
        name: float(np.median([np.sum(change[name] ** 2) for change in changes if name in change])) for name in SHAPES
    }
    found = squared_distances(increments(updates))
    common = float(np.sum((changes[0][LAYER] - changes[2][LAYER]) ** 2))
    assert found[0, 2] == pytest.approx(common * sum(energy.values()) / energy[LAYER], rel=1e-6)
    assert np.isinf(found[0, 1]), "nothing in common"


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_the_geometric_median_is_where_no_step_leads_nearer(seed: int) -> None:
    updates = updates_from(learnt_state(8), aggregators.build("increment"), RANKS, seed=seed)
    weights = geometric_median(byzantine=BAD).judge(increments(updates)).weights
    points = np.stack([vector(update) for update in updates])
    middle = np.asarray([weights[update.client] for update in updates]) @ points

    def cost(at: Vector) -> float:
        return float(np.sum(np.linalg.norm(points - at, axis=1)))

    draw = np.random.default_rng(seed)
    for size in (1e-1, 1e-2, 1e-3):
        steps = [*(point - middle for point in points), *draw.standard_normal((5, middle.size))]
        assert all(cost(middle + size * step) >= cost(middle) - 1e-9 for step in steps)
    assert sum(weights.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", JUDGED)
@settings(max_examples=10, deadline=None)
@given(seed=seeds, factor=st.sampled_from([0.0, 0.25, 1.0]))
def test_a_scaled_update_has_the_scaled_increment(name: str, seed: int, factor: float) -> None:
    method = aggregators.build(name)
    [update] = updates_from(learnt_state(8), method, [4], seed=seed, size=0.02)
    after = scaled(method, update, factor)
    wanted, found = factor * vector(update), vector(after)
    # A mean of factors gets the nearest pair of the old rank.
    bent = method.of_factors and not method.apart
    room = 0.5 * np.linalg.norm(vector(update)) if bent and factor not in {0.0, 1.0} else 0.0
    assert np.linalg.norm(found - wanted) <= room + 1e-5


def test_the_canonical_pair_of_what_was_received_is_what_was_received() -> None:
    received = learnt_state(6).adapter[LAYER]
    found = canonical(received, regauged(received, 50 * np.eye(6)))
    assert np.allclose(found.a, received.a, atol=1e-5)
    assert np.allclose(found.b, received.b, atol=1e-5)
    empty = Pair(received.a, np.zeros_like(received.b))
    assert np.allclose(canonical(empty, empty).a, empty.a, atol=1e-5), "rows without a product stay"


# ── bad input ─────────────────────────────────────────────────────────────────────────────────────────────────────


@every_rule
def test_fewer_updates_than_a_rule_needs_are_refused_with_both_numbers(rule: str) -> None:
    state, method = learnt_state(8), aggregators.build("increment", robust=rule, byzantine=2)
    few = updates_from(state, method, [4] * (method.least - 1))
    with pytest.raises(AggregationError, match=rf"'{rule}' needs {method.least} .*of {method.least - 1}; raise"):
        method.combine(state, few)


def test_numbers_that_are_not_finite_are_left_out_and_named() -> None:
    state, method = learnt_state(8), aggregators.build("increment", robust="krum")
    updates = updates_from(state, method, [4] * 6)
    broken = {layer: Pair(pair.a * np.float32(np.nan), pair.b) for layer, pair in updates[0].trained.items()}
    merged = method.combine(state, [replace(updates[0], trained=Adapter(broken)), *updates[1:]])
    assert merged.excluded["device-0"] == "its numbers are not finite"
    assert np.isfinite(products(merged.state.adapter)).all()


def test_a_layer_that_too_few_devices_trained_stays_as_it_is() -> None:
    state, method = learnt_state(8), aggregators.build("increment", robust="multi_krum")
    updates = updates_from(state, method, [4] * 6)
    part = [
        update if index < 2 else replace(update, trained=Adapter({LAYER: update.trained[LAYER]}))
        for index, update in enumerate(updates)
    ]
    merged = method.combine(state, part)
    assert set(merged.layers) == {LAYER}
    assert len(merged.excluded) == 1


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"robust": "mean"}, "unknown robust rule 'mean'; expected one of: clip, geometric_median, krum, median, "),
        ({"robust": "krum", "byzantine": -1}, "robust rule 'krum': aggregator.byzantine must be a whole number"),
        ({"robust": "krum", "byzantine": 1.5}, "found 1.5"),
        ({"robust": "clip", "ratio": float("nan")}, "aggregator.ratio must be positive"),
        ({"robust": "clip", "max_norm": "much"}, "robust rule 'clip'"),
        ({"robust": "krum", "ratio": 2.0}, "method 'increment'.*'ratio'"),
        ({"byzantine": 1}, "method 'increment'.*'byzantine'"),
    ],
)
def test_names_and_values_that_cannot_be_are_refused(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        aggregators.build("increment", **parameters)  # type: ignore[arg-type]


# ── a fleet ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_fleet_too_small_for_its_rule_is_refused_at_the_start(make: Callable[..., Bench]) -> None:
    with pytest.raises(ConfigError, match=r"needs 5 updates a round.* begin with 2"):
        make("aggregator.robust=multi_krum")


def learnt(bench: Bench, hands: Sequence[Hand], attacker: str) -> float:
    """Distance of the last global adapter from what the honest devices want, after all rounds."""
    while bench.directive.phase == "train":
        for hand in hands:
            if hand.name == attacker:
                hand.trainer.targets = {name: -3 * goal for name, goal in GOAL.items()}
            hand.deliver(*hand.train())
    goal = optimum([hand.trainer for hand in hands if hand.name != attacker])
    found = bench.broadcast()
    return float(sum(np.sum((found[name].product() - wanted) ** 2) for name, wanted in goal.items()))


@pytest.mark.parametrize("rule", ["multi_krum", "trimmed_mean"])
def test_a_fleet_with_an_attacker_names_it_and_learns_what_the_honest_want(
    rule: str, make: Callable[..., Bench]
) -> None:
    names = dict.fromkeys("abcde", 4) | {"evil": 4}
    overrides: tuple[str, ...] = (
        "rounds.num_rounds=6",
        f"rounds.min_available_nodes={len(names)}",
        "wire.codec_down=fp32",
    )
    # Or the last of its updates would be refused before any merge.
    overrides = (*overrides, "server.max_norm_ratio=1e9")
    plain = make(*overrides, "training.max_steps=20")
    attacked = learnt(plain, training(plain, names), "evil")
    plain.store.close()
    plain.folder /= "guarded"
    bench = Bench(plain.folder, *overrides, "training.max_steps=20", f"aggregator.robust={rule}")
    guarded = learnt(bench, training(bench, names), "evil")
    merges = [record for record in bench.records if record["event"] == "merge"]
    assert [set(merge["excluded"]) for merge in merges] == [{"evil"}] * len(merges)
    assert len(merges) == 6
    assert any("left out 'evil'" in note for note in bench.notes)
    assert bench.service._journal.refusals["excluded"] == 6
    assert guarded < 0.2 * attacked
    bench.store.close()
