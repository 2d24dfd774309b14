"""Trimmed mean and median in the joint basis: their formulae on dense matrices, and what bad devices can do."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import cut, scale, zero
from server import aggregators
from server.aggregators.method import LayerReport, State, Update
from server.aggregators.robust import ROBUST, coordinates
from server.aggregators.robust.basis import basis, changes
from server.aggregators.robust.rule import Coordinatewise, Trim
from server.aggregators.robust.trimmed_mean import trimmed_mean
from server.aggregators.robust.trimming import outside, trimmed
from server.merging import merge_facts
from tests.server.bench import Bench
from tests.server.merging import LAYER, SHAPES, Dense, dense, learnt_state, updates_from
from tests.strategies import gaussian

both = pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
seeds = st.integers(0, 2**16)
WHOLE = 18
"""A global rank at which nothing is cut off."""
RANKS = (2, 3, 8, 4, 8, 2, 5, 8, 6, 4)
BAD = 3
OTHER = next(name for name in SHAPES if name != LAYER)
Wide = NDArray[np.float64]


def change(update: Update, name: str) -> Wide:
    """What a device changed in one layer, densely."""
    return np.asarray(update.discount * (dense(update.trained)[name] - dense(update.received)[name]))


def moved(state: State, updates: Sequence[Update], method: str = "increment", **parameters: object) -> Dense:
    """How far a merge moves each product of the global adapter, its tail included."""
    after = aggregators.build(method, **parameters).combine(state, updates).state  # type: ignore[arg-type]
    return {name: dense(after.adapter)[name] + dense(after.tail)[name] - dense(state.adapter)[name] for name in SHAPES}


def size(products: Dense) -> float:
    return float(np.sqrt(sum(np.sum(product**2) for product in products.values())))


def apart(one: Dense, two: Dense) -> float:
    return size({name: one[name] - two[name] for name in SHAPES})


def eigenvectors(gram: Wide) -> Wide:
    """Those of eigenvalues that are not rounding."""
    values, vectors = np.linalg.eigh(gram)
    return vectors[:, values > 1e-12 * values[-1]]


def naive(updates: Sequence[Update], name: str, entry: Callable[[Wide], float]) -> Wide:
    """A rule by its formula: dense changes, a dense basis, one entry after the other."""
    found = [change(update, name) for update in updates if name in update.trained]
    u = eigenvectors(np.sum([one @ one.T / np.sum(one**2) for one in found], axis=0))
    v = eigenvectors(np.sum([one.T @ one / np.sum(one**2) for one in found], axis=0))
    cores = np.stack([u.T @ one @ v for one in found])
    middle = np.asarray([[entry(cores[:, i, j]) for j in range(v.shape[1])] for i in range(u.shape[1])])
    return np.asarray(u @ middle @ v.T)


def repeated(values: Wide, weights: Sequence[int], f: int) -> float:
    """A trimmed mean in which each device stands as often as it has examples."""
    cap = sorted(weights)[-1 - 2 * f]
    counts = [min(weight, cap) for weight in weights]
    row = np.sort(np.repeat(values, counts))
    return float(np.mean(row[f * cap : row.size - f * cap]))


def different(state: State, seed: int) -> list[Update]:
    """Ten devices of unequal ranks, whose layers, ages and slices differ."""
    updates = updates_from(state, aggregators.build("increment"), RANKS, seed=seed)
    updates[4] = replace(updates[4], discount=0.5)
    updates[6] = replace(updates[6], trained=updates[6].trained.only([LAYER]))
    moved = {name: cut(pair, 3) for name, pair in updates[7].trained.items()}
    # An increment of no slice, such as a gateway's.
    nothing = {name: zero(pair.shape, pair.rank) for name, pair in moved.items()}
    updates[7] = replace(updates[7], received=Adapter(nothing), trained=Adapter(moved))
    return updates


# ── the formulae ──────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=10, deadline=None)
@given(seed=seeds, f=st.integers(0, 4))
def test_the_trimmed_mean_is_its_formula_on_dense_matrices(seed: int, f: int) -> None:
    state = learnt_state(WHOLE)
    updates = different(state, seed)
    found = moved(state, updates, robust="trimmed_mean", byzantine=f)
    for name in SHAPES:
        weights = [int(update.weight) for update in updates if name in update.trained]
        wanted = naive(updates, name, partial(repeated, weights=weights, f=f))
        assert np.linalg.norm(found[name] - wanted) < 1e-4 * np.linalg.norm(wanted)


@settings(max_examples=10, deadline=None)
@given(seed=seeds, count=st.sampled_from([3, 6, 10]))
def test_the_median_is_its_formula_on_dense_matrices_whatever_devices_claim(seed: int, count: int) -> None:
    state = learnt_state(WHOLE)
    updates = different(state, seed)[:count]
    found = moved(state, [replace(update, weight=10.0**index) for index, update in enumerate(updates)], robust="median")
    for name in SHAPES:
        wanted = naive(updates, name, lambda row: float(np.median(row)))
        assert np.linalg.norm(found[name] - wanted) < 1e-4 * np.linalg.norm(wanted)


@pytest.mark.parametrize("method", ["increment", "svd"])
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_without_bad_devices_the_trimmed_mean_is_the_mean(method: str, seed: int) -> None:
    state = learnt_state(WHOLE)
    updates = different(state, seed) if method == "increment" else updates_from(state, aggregators.build(method), RANKS)
    wanted = moved(state, updates, method)
    assert apart(moved(state, updates, method, robust="trimmed_mean", byzantine=0), wanted) < 1e-5 * size(wanted)


@both
@settings(max_examples=10, deadline=None)
@given(seed=seeds, power=st.integers(-6, 6))
def test_what_all_devices_agree_on_happens(rule: str, seed: int, power: int) -> None:
    state = learnt_state(WHOLE)
    [one] = updates_from(state, aggregators.build("increment"), [5], seed=seed, size=10.0**power)
    updates = [replace(one, client=f"device-{index}", weight=1.0 + index) for index in range(5)]
    found = moved(state, updates, robust=rule)
    rounding = 1e-5 * size({name: change(one, name) for name in SHAPES}) + 1e-6 * size(dense(state.adapter))
    assert apart(found, {name: change(one, name) for name in SHAPES}) < rounding


@both
@settings(max_examples=10, deadline=None)
@given(seed=seeds, data=st.data())
def test_who_is_called_what_makes_no_difference(rule: str, seed: int, data: st.DataObject) -> None:
    state = learnt_state(WHOLE)
    updates = different(state, seed)
    names = data.draw(st.permutations([update.client for update in updates]))
    renamed = [replace(update, client=name) for update, name in zip(updates, names, strict=True)]
    wanted = moved(state, updates, robust=rule)
    assert apart(moved(state, renamed, robust=rule), wanted) < 1e-5 * size(wanted)


@both
def test_a_device_receives_the_leading_directions_of_what_was_merged(rule: str) -> None:
    state, method = learnt_state(8), aggregators.build("increment", robust=rule)
    after = method.combine(state, updates_from(state, method, RANKS)).state.adapter
    for name, pair in after.items():
        u, s, vt = np.linalg.svd(dense(after)[name])
        for rank in range(1, pair.rank + 1):
            best = (u[:, :rank] * s[:rank]) @ vt[:rank]
            assert np.allclose(cut(pair, rank).product(), best, atol=1e-5)


# ── bad devices ───────────────────────────────────────────────────────────────────────────────────────────────────


def attacked(updates: Sequence[Update], way: str, factor: float, weight: float, seed: int) -> list[Update]:
    """The last devices send something else: each a direction of its own, all the same, or the opposite of others."""
    honest = updates[:-BAD]
    bad = []
    for index, update in enumerate(updates[-BAD:]):
        moved = {}
        for name, pair in update.trained.items():
            if way == "honest":
                other = honest[index].trained.get(name, pair)
                moved[name] = scale(other, -factor)
            else:
                moved[name] = scale(gaussian(pair.shape, pair.rank, seed + (index if way == "own" else 0)), factor)
        nothing = {name: zero(pair.shape, pair.rank) for name, pair in moved.items()}
        bad.append(replace(update, received=Adapter(nothing), trained=Adapter(moved), weight=weight, discount=1.0))
    return [*honest, *bad]


@both
@settings(max_examples=25, deadline=None)
@given(
    seed=seeds,
    way=st.sampled_from(["own", "same", "honest"]),
    power=st.integers(-3, 36),
    claim=st.sampled_from([1e-3, 1.0, 1e6, 1e15]),
)
def test_three_of_ten_move_the_result_no_further_than_honest_devices_lie_apart(
    rule: str, seed: int, way: str, power: int, claim: float
) -> None:
    """The bound of the modules: it knows nothing of what the bad devices do."""
    state = learnt_state(WHOLE)
    updates = different(state, seed)
    found = moved(state, attacked(updates, way, 10.0**power, claim, seed), robust=rule, byzantine=BAD)
    for name in SHAPES:
        honest = np.stack([change(update, name) for update in updates[:-BAD] if name in update.trained])
        spread = float(np.sum((honest - honest.mean(axis=0)) ** 2))
        count = len(honest) + BAD
        bound = np.sqrt(spread / (1 if rule == "trimmed_mean" else (count + 1) // 2 - BAD))
        assert np.linalg.norm(found[name] - honest.mean(axis=0)) <= bound * 1.001 + 1e-5


def test_a_claim_of_examples_counts_for_no_more_than_many_others_claim() -> None:
    trim = trimmed_mean(byzantine=2).trim(np.asarray([5.0, 1e15, 3.0, 4.0, 2.0, 1e15, 1.0]))
    assert trim.masses.tolist() == [3.0, 3.0, 3.0, 3.0, 2.0, 3.0, 1.0]
    assert trim.ends * trim.masses.max() < trim.masses.sum() / 2


def test_devices_that_go_far_do_not_choose_the_basis() -> None:
    """Seven honest devices change nearly the same two directions; three go far in directions of their own."""
    common = gaussian((60, 50), 2, 0)
    honest = [[(1.0, common), (1e-3, gaussian((60, 50), 4, index))] for index in range(1, 8)]
    bad = [[(1e9, gaussian((60, 50), 2, 100 + index))] for index in range(3)]
    found = basis(changes([*honest, *bad]), 4, seed="a")
    product = common.product().astype(np.float64)
    inside = found.u @ (found.u.T @ product @ found.v.T) @ found.v
    assert found.u.shape[1] == 4
    assert not found.whole
    assert np.linalg.norm(product - inside) < 0.2 * np.linalg.norm(product)


@both
@pytest.mark.parametrize("size", [1e3, 1e36])
def test_who_counts_for_nothing_is_named_and_what_counted_is_written_down(rule: str, size: float) -> None:
    state, method = learnt_state(8), aggregators.build("increment", robust=rule, byzantine=BAD)
    updates = attacked(different(state, 1), "own", size, 1e6, 1)
    merged = method.combine(state, updates)
    assert set(merged.excluded) == {update.client for update in updates[-BAD:]}
    assert all("counted, and of the usual one" in why for why in merged.excluded.values())
    facts = merge_facts(merged)
    assert set(facts["counted"]) == {update.client for update in updates}
    assert all(0 <= share <= 1 for share in facts["counted"].values())
    assert {layer.updates for layer in merged.layers.values()} == {9, 10}


@both
def test_devices_that_say_the_same_all_count_and_one_that_says_the_opposite_does_not(rule: str) -> None:
    """Rounding decides whose entries are trimmed among equal ones, and names nobody."""
    state, method = learnt_state(8), aggregators.build("increment", robust=rule)
    [one] = updates_from(state, method, [5])
    evil = replace(one, client="evil", received=one.trained, trained=one.received)
    same = [replace(one, client=f"device-{index}", weight=0.1 + index) for index in range(5)]
    merged = method.combine(state, [*same, evil])
    assert {name: share for name, share in merged.counted.items() if name != "evil"} == pytest.approx(
        {update.client: 1.0 for update in same}
    )
    assert merged.counted["evil"] < 1e-6
    assert set(merged.excluded) == {"evil"}


@both
def test_what_no_number_can_be_is_left_out_before(rule: str) -> None:
    state, method = learnt_state(8), aggregators.build("increment", robust=rule)
    updates = different(state, 1)
    broken = {name: Pair(pair.a * np.float32(np.inf), pair.b) for name, pair in updates[0].trained.items()}
    merged = method.combine(state, [replace(updates[0], trained=Adapter(broken)), *updates[1:]])
    assert merged.excluded["device-0"] == "its numbers are not finite"
    assert "device-0" not in merged.counted


# ── entries ───────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=50, deadline=None)
@given(seed=seeds, f=st.integers(1, 3), more=st.integers(1, 5), power=st.integers(0, 150))
def test_rounding_lets_nothing_through_that_is_trimmed(seed: int, f: int, more: int, power: int) -> None:
    """Masses of any fraction: what is left of a trimmed one by rounding would count, if its value were large enough."""
    draw = np.random.default_rng(seed)
    values = draw.standard_normal((20, 2 * f + more))
    values[:, :f] *= 10.0**power
    found, within = trimmed(values, trimmed_mean(byzantine=f).trim(draw.uniform(0.1, 9.0, 2 * f + more)))
    assert (found <= values[:, f:].max(axis=1) + 1e-9).all()
    assert (found >= values[:, f:].min(axis=1) - 1e-9).all()
    assert (np.abs(within) <= np.abs(values)).all()
    assert np.abs(within).max() <= np.abs(values[:, f:]).max()


@both
@settings(max_examples=50, deadline=None)
@given(seed=seeds, f=st.integers(0, 3), more=st.integers(1, 5), power=st.integers(0, 8))
def test_what_is_outside_of_a_basis_is_bounded_by_its_squares(
    rule: str, seed: int, f: int, more: int, power: int
) -> None:
    """Also where the means are large: the devices agree on them."""
    draw = np.random.default_rng(seed)
    values = draw.standard_normal((20, 2 * f + more)) * draw.uniform(0, 1, (20, 1)) + draw.standard_normal((20, 1))
    values[:, :f] *= 10.0**power
    built = ROBUST[rule](byzantine=f)
    assert isinstance(built, Coordinatewise)
    trim = built.trim(draw.uniform(0.1, 9.0, 2 * f + more))
    bound = outside(np.sum(values**2, axis=0), trim)
    assert np.linalg.norm(trimmed(values, trim)[0]) <= bound * 1.0001
    assert bound <= np.linalg.norm(values[:, f:]) * 1.0001, "no minority blows it up"


def test_of_equal_values_it_does_not_matter_who_goes() -> None:
    values = np.asarray([[0.0, 0.0, 0.0, 1.0, 2.0]])
    masses = np.asarray([1.0, 2.0, 4.0, 4.0, 4.0])
    found = [trimmed(values[:, order], Trim(masses[order], 1))[0][0] for order in ([0, 1, 2, 3, 4], [2, 1, 0, 4, 3])]
    assert found[0] == found[1] == pytest.approx(4.0 / 7.0)


# ── a basis that is cut ───────────────────────────────────────────────────────────────────────────────────────────


@both
@settings(max_examples=10, deadline=None)
@given(seed=seeds, most=st.integers(4, 17))
def test_what_a_cut_basis_leaves_out_is_in_the_report(rule: str, seed: int, most: int) -> None:
    state = State(Adapter({name: cut(pair, 2) for name, pair in learnt_state(WHOLE).adapter.items()}), Adapter({}), 3)
    method = aggregators.build("increment", robust=rule, byzantine=BAD, tail=WHOLE / 2)
    updates = attacked(updates_from(state, method, [2] * 10, seed=seed), "own", 1e6, 1.0, seed)

    def change_at(directions: int) -> tuple[Dense, dict[str, LayerReport]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coordinates, "DIRECTIONS", directions)
            merged = method.combine(state, updates)
        after = {name: dense(merged.state.adapter)[name] + dense(merged.state.tail)[name] for name in SHAPES}
        return after, dict(merged.layers)

    (wanted, exact), (found, told) = change_at(256), change_at(most)
    for name, shape in SHAPES.items():
        assert exact[name].lost < 1e-6
        assert np.linalg.norm(found[name] - wanted[name]) <= told[name].lost + 1e-5
        assert ("outside of them at most" in told[name].why) == (most < max(shape))


@both
def test_no_dense_matrix_is_formed(rule: str) -> None:
    shape = (1500, 1800)
    state = State(Adapter({LAYER: gaussian(shape, 2, 0)}), Adapter({}), 3)
    nothing = Adapter({LAYER: zero(shape, 2)})
    updates = [Update(f"{n}", 1.0, nothing, Adapter({LAYER: gaussian(shape, 2, n)})) for n in range(5)]
    method = aggregators.build("increment", robust=rule)
    tracemalloc.start()
    method.combine(state, updates)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * shape[0] * shape[1] / 2, "half of it, in float32"


# ── a fleet ───────────────────────────────────────────────────────────────────────────────────────────────────────


@both
def test_a_fleet_too_small_for_it_is_refused_at_the_start(rule: str, make: Callable[..., Bench]) -> None:
    with pytest.raises(ConfigError, match=r"needs 5 updates a round.* begin with 2"):
        make(f"aggregator.robust={rule}", "aggregator.byzantine=2")
