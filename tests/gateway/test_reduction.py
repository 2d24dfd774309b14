"""Summing the updates of a subtree first changes nothing but what the certificate says."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.config import Aggregator, Config
from edge_runtime.errors import AggregationError, ConfigError, CorruptPayloadError
from edge_runtime.gateway.reduction import Reduced, owing, reduce
from edge_runtime.gateway.subtree import method_of
from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.algebra import scale
from edge_runtime.wire import blobs, codec
from edge_runtime.wire.messages import Offer, dump, load
from server import aggregators, offers
from server.aggregators.method import Merged, State, Update
from server.fleet import Member
from server.rows import Rows
from server.slices import update_of
from server.state import EVERYBODY
from server.state import State as RoundsState
from tests.runtime.said import hello
from tests.server.life import policy
from tests.server.merging import LAYER, SHAPES, Dense, dense, learnt_state, updates_from

NOTHING = Adapter({})
WIDE = 64
METHOD = aggregators.build("increment")
ROUNDING = 3e-6

shares = st.lists(st.integers(1, 3), min_size=1, max_size=4)


def partial_updates(state: State, groups: Sequence[int], seed: int) -> list[list[Update]]:
    """Updates of unlike ranks, weights and layers, in groups of these sizes."""
    draw = np.random.default_rng(seed)
    count = sum(groups)
    ranks = [int(rank) for rank in draw.integers(1, 6, count)]
    made = updates_from(state, METHOD, ranks, weights=[float(w) for w in draw.integers(1, 50, count)], seed=seed)
    kept = []
    for index, update in enumerate(made):
        layers = {n: p for n, p in update.trained.items() if n == LAYER or index % 3}
        kept.append(Update(f"{index:02}", update.weight, update.received, Adapter(layers)))
    at = np.cumsum([0, *groups])
    return [kept[start:stop] for start, stop in itertools.pairwise(at)]


def offered(name: str, found: Reduced, sent: Adapter) -> Update:
    """What the fleet above makes of an increment that travelled."""
    most = max(found.weights.values())
    offer = Offer(
        client=name, round=1, version=3, blob=blobs.describe(b"", 1024), examples=round(most), loss_first=1.0,
        loss_last=1.0, kind="increment", weights=tuple((n, round(w)) for n, w in found.weights.items() if w != most),
    )  # fmt: skip
    again = load(dump(offer))
    assert isinstance(again, Offer)
    return update_of(again, sent, learnt_state(8).adapter)


def norm_of(state: State) -> float:
    return max(1.0, float(np.sqrt(sum(np.sum(layer**2) for layer in dense(state.adapter).values()))))


def whole(state: State) -> Dense:
    """The product of adapter and tail together: all that is known, whatever the global rank is."""
    tail = dense(state.tail)
    return {name: layer + tail.get(name, 0.0) for name, layer in dense(state.adapter).items()}


@settings(max_examples=40, deadline=None)
@given(groups=shares, seed=st.integers(0, 2**16))
def test_a_tree_is_flat(groups: list[int], seed: int) -> None:
    state = learnt_state(8)
    parts = partial_updates(state, groups, seed)
    method = aggregators.build("increment", tail=WIDE)
    flat = method.combine(state, [update for part in parts for update in part])
    reduced = [reduce(METHOD, part, NOTHING, rank=WIDE, version=3) for part in parts]
    tree = method.combine(state, [offered(f"g{at}", found, found.increment) for at, found in enumerate(reduced)])
    wanted = whole(flat.state)
    for name, found in whole(tree.state).items():
        assert np.linalg.norm(found - wanted[name]) <= ROUNDING * norm_of(flat.state)


@settings(max_examples=40, deadline=None)
@given(groups=shares, seed=st.integers(0, 2**16), rank=st.integers(1, 5))
def test_a_narrow_increment_differs_by_no_more_than_its_certificate(groups: list[int], seed: int, rank: int) -> None:
    state = learnt_state(8)
    parts = partial_updates(state, groups, seed)
    method = aggregators.build("increment", tail=WIDE)
    flat = whole(method.combine(state, [update for part in parts for update in part]).state)
    reduced = [reduce(METHOD, part, NOTHING, rank=rank, version=3) for part in parts]
    assert all(pair.rank <= rank for found in reduced for pair in found.increment.values())
    merged = method.combine(state, [offered(f"g{at}", found, found.increment) for at, found in enumerate(reduced)])
    for name, found in whole(merged.state).items():
        total = sum(each.weights.get(name, 0.0) for each in reduced)
        bound = sum(
            each.weights[name] / total * each.merged.layers[name].truncated for each in reduced if name in each.weights
        )
        assert np.linalg.norm(found - flat[name]) <= bound + ROUNDING * norm_of(state)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), rank=st.integers(1, 6), codec_name=st.sampled_from(["int8", "int2", "topk"]))
def test_what_was_sent_and_what_is_owed_are_the_whole(seed: int, rank: int, codec_name: str) -> None:
    """Over two rounds of other weights: nothing of the sum over examples is lost, whatever cut and codec drop."""
    state, owed = learnt_state(8), NOTHING
    due = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    arrived = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for turn in range(2):
        [part] = partial_updates(state, [3], seed + turn)
        exact = reduce(METHOD, part, NOTHING, rank=WIDE, version=3)
        method = aggregators.build("increment", tail=WIDE)
        found = reduce(method, part, owed, rank=rank, version=3)
        sent = codec.decode(codec.encode(found.increment, codec_name))
        owed = owing(found, sent, owed, rank=WIDE)
        for name, weight in exact.weights.items():
            due[name] += weight * dense(exact.increment)[name]
            arrived[name] += weight * dense(sent)[name]
    left = dense(owed)
    for name, wanted in due.items():
        size = max(1.0, float(np.linalg.norm(wanted)))
        assert np.linalg.norm(arrived[name] + left.get(name, 0.0) - wanted) <= 1e-5 * size


def test_an_idle_round_owes_nothing_and_sends_a_zero() -> None:
    state = learnt_state(8)
    found = reduce(METHOD, updates_from(state, METHOD, [4, 2], size=0.0), NOTHING, rank=8, version=3)
    assert all(np.linalg.norm(layer) < 1e-6 for layer in dense(found.increment).values())
    assert all(pair.rank >= 1 for pair in found.increment.values())


def test_layers_that_nobody_trained_are_owed_still() -> None:
    state = learnt_state(8)
    only = [Update(u.client, u.weight, u.received, Adapter({LAYER: u.trained[LAYER]})) for u in updates_from(
        state, METHOD, [4]
    )]  # fmt: skip
    before = learnt_state(2).adapter
    found = reduce(METHOD, only, before, rank=8, version=3)
    assert set(found.increment) == {LAYER}
    [other] = set(SHAPES) - {LAYER}
    assert owing(found, found.increment, before, rank=8)[other] is before[other]


def test_no_update_makes_no_increment() -> None:
    with pytest.raises(AggregationError, match="at least one update"):
        reduce(METHOD, [], NOTHING, rank=8, version=3)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
def test_a_rule_that_puts_one_change_in_the_place_of_all_does_so_at_a_site(rule: str) -> None:
    """The site sends what its rule would make of the fleet, for the examples of those who counted."""
    state, ruled = learnt_state(18), aggregators.build("increment", robust=rule)
    updates = updates_from(state, METHOD, [3, 5, 2, 4, 4])
    away = Adapter({name: scale(pair, 1e6) for name, pair in updates[1].trained.items()})
    updates[1] = replace(updates[1], trained=away)
    found = reduce(ruled, updates, NOTHING, rank=WIDE, version=3)
    assert set(found.merged.excluded) == {"device-1"}
    assert set(found.weights.values()) == {sum(update.weight for update in updates) - updates[1].weight}
    moved = whole(METHOD.combine(state, [offered("site", found, found.increment)]).state)
    wanted = whole(ruled.combine(state, updates).state)
    for name in SHAPES:
        assert np.linalg.norm(moved[name] - wanted[name]) < 1e-5 * norm_of(state)


def test_whoever_a_rule_leaves_out_gives_the_sum_no_weight() -> None:
    state = learnt_state(8)
    updates = updates_from(state, METHOD, [4, 2, 3], weights=[10.0, 20.0, 5.0])
    banned = updates[1].client

    def combine(before: State, given: Iterable[Update]) -> Merged:
        merged = METHOD.combine(before, [update for update in given if update.client != banned])
        return replace(merged, excluded={banned: "by a rule"})

    ruled = METHOD._replace(combine=combine)
    found = reduce(ruled, updates, NOTHING, rank=WIDE, version=3)
    left = [update for update in updates if update.client != banned]
    wanted = reduce(METHOD, left, NOTHING, rank=WIDE, version=3)
    assert found.weights == wanted.weights == dict.fromkeys(SHAPES, 15.0)
    assert found.increment.digest() == wanted.increment.digest()
    # What is owed is a sum over examples: it counts as much when fewer of them are left to spread it over.
    owed = learnt_state(2).adapter
    found = reduce(ruled, updates, owed, rank=WIDE, version=3)
    wanted = reduce(METHOD, left, owed, rank=WIDE, version=3)
    assert found.increment.digest() == wanted.increment.digest()


# ── what the fleet above takes ────────────────────────────────────────────────────────────────────────────────────


def increment_offer(**changes: object) -> Offer:
    facts = {
        "client": "g", "round": 1, "version": 3, "blob": blobs.describe(b"", 1024), "examples": 10,
        "loss_first": 1.0, "loss_last": 1.0, "kind": "increment",
    }  # fmt: skip
    return Offer.model_validate(facts | changes)


def test_an_increment_may_be_wider_than_the_global_adapter_and_no_wider_than_its_layer() -> None:
    wide = learnt_state(10).adapter
    assert update_of(increment_offer(), wide, learnt_state(2).adapter).trained is wide
    too_wide = Adapter({LAYER: learnt_state(14).adapter[LAYER]})
    update_of(increment_offer(), too_wide, learnt_state(2).adapter)
    with pytest.raises(CorruptPayloadError, match="rank 1 to 2, found"):
        update_of(increment_offer(kind="slice"), wide, learnt_state(2).adapter)


@pytest.mark.parametrize("weights", [((LAYER, 11),), (("model.layers.9.q_proj", 5),)])
def test_weights_are_of_layers_of_the_update_and_at_most_its_examples(weights: tuple[tuple[str, int], ...]) -> None:
    with pytest.raises(CorruptPayloadError, match="claims"):
        update_of(increment_offer(weights=weights), learnt_state(2).adapter, learnt_state(2).adapter)


def test_a_fleet_without_increments_refuses_one() -> None:
    """A gateway does not join such a fleet; whoever offers one all the same is told why."""
    state = RoundsState(
        run="one", phase="train", round=1, version=3, members=Rows({"g": Member(hello=hello("g"))}), sample=EVERYBODY
    )
    refused = offers.refusal(state, increment_offer(), policy())
    assert refused is not None
    assert refused.code == "kind"
    assert offers.refusal(state, increment_offer(), policy(increments=True)) is None
    assert offers.refusal(state, increment_offer(kind="slice"), policy()) is None


def test_a_site_takes_no_server_optimiser() -> None:
    config = Config(aggregator=Aggregator.model_validate({"optimizer": "adam"}))
    with pytest.raises(ConfigError, match="to the fleet above"):
        method_of(config, print)
