"""A device's own adapter, made over the broker in memory: each way, what it keeps, and what outlives what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime import config, ways
from edge_runtime.cli import client
from edge_runtime.errors import ConfigError
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import cut, decompose, to_pair
from edge_runtime.trainer import PersonalSpec
from edge_runtime.wire import codec
from edge_runtime.wire.messages import Accepted, Directive, Offer, Report
from tests.runtime.desk import WELCOME, Desk, adapter, of, states
from tests.runtime.said import SPEC, directive
from tests.runtime.toy import ToyTrainer

FINETUNE, BESIDE = PersonalSpec(way="finetune", steps=3), PersonalSpec(way="beside", steps=3, rank=3)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def finished(desk: Desk, whole: Adapter, personal: PersonalSpec = FINETUNE, **changes: Any) -> Report:
    """Let the device finish with that version; its last report."""
    said = desk.tell(desk.publish(whole, "finish", 1, version=1, personal=personal, **changes), WELCOME)
    found = of(Report, said)[-1]
    assert isinstance(found, Report)
    assert found.state == "done"
    return found


def dense(found: Adapter) -> dict[str, np.ndarray]:
    return {name: pair.product() for name, pair in found.items()}


def same(one: Adapter, other: Adapter) -> None:
    for name, product in dense(one).items():
        np.testing.assert_allclose(product, dense(other)[name], rtol=1e-4, atol=1e-5)


def own_choice(desk: Desk, own: ways.Own) -> None:
    desk.client._personal._own = own


def received(desk: Desk, asked: Directive) -> Adapter:
    return desk.client._received(asked)


def test_a_pair_beside_is_trained_and_all_that_came_from_the_fleet_stays(desk: Desk) -> None:
    asked = desk.publish(adapter(2), "finish", 1, version=1, personal=BESIDE)
    said = desk.tell(asked, WELCOME)
    live, held = desk.trainer.live, received(desk, asked)
    for name, pair in live.items():
        fleet = held[name]
        assert pair.rank == fleet.rank + 3
        assert np.array_equal(pair.a[: fleet.rank], fleet.a)
        assert np.array_equal(pair.b[:, : fleet.rank], fleet.b)
        assert pair.b[:, fleet.rank :].any()
    done = of(Report, said)[-1]
    assert (done.way, done.delivered) == ("beside", "personal")
    assert done.held_out.personal < done.held_out.merged


def test_half_of_what_is_trained_is_the_rank_beside_when_nobody_says_another(desk: Desk) -> None:
    finished(desk, adapter(2), BESIDE.model_copy(update={"rank": 0}))
    assert set(desk.trainer.live.ranks.values()) == {4 + 1}


def test_a_devices_own_file_comes_before_the_fleets(desk: Desk) -> None:
    own_choice(desk, ways.Own(way="beside", rank=2, proximal=0.5))
    done = finished(desk, adapter(2))
    assert done.way == "beside"
    assert set(desk.trainer.live.ranks.values()) == {4 + 2}


def test_the_report_says_which_way_it_was(desk: Desk) -> None:
    assert finished(desk, adapter(2)).way == "finetune"


# ── the better one ────────────────────────────────────────────────────────────────────────────────────────────────


def disagrees(trainer: ToyTrainer) -> float:
    """A device whose texts that choose know nothing of what it trained."""
    return float(len(trainer.rounds))


def test_a_worse_personal_adapter_gives_way_to_the_global_one_and_is_said(desk: Desk) -> None:
    desk.trainer.chooses = disagrees
    asked = desk.publish(adapter(2), "finish", 1, version=1, personal=FINETUNE)
    done = of(Report, desk.tell(asked, WELCOME))[-1]
    assert (done.way, done.delivered) == ("finetune", "global")
    assert "worse" in done.detail
    same(desk.trainer.live, received(desk, asked))
    assert done.held_out.personal < done.held_out.merged, "what is reported is of other texts, and of what was made"
    assert desk.disk.personal is not None
    assert desk.disk.personal[1] is None, "the next time begins from the fleet's"


def test_an_owner_may_keep_a_worse_one_all_the_same(desk: Desk) -> None:
    desk.trainer.chooses = disagrees
    own_choice(desk, ways.Own(keep_better=False))
    done = finished(desk, adapter(2))
    assert done.delivered == "personal"
    assert "worse" in done.detail


def test_a_better_one_is_kept(desk: Desk) -> None:
    desk.trainer.chooses = lambda trainer: -float(len(trainer.rounds))
    assert finished(desk, adapter(2)).delivered == "personal"


# ── what outlives what ────────────────────────────────────────────────────────────────────────────────────────────


def go_on(desk: Desk, whole: Adapter, number: int, personal: PersonalSpec, **changes: Any) -> list[Any]:
    """A round that ends with its update accepted."""
    asked = desk.publish(whole, round_number=number, personal=personal, **changes)
    said = desk.tell(asked, WELCOME)
    offer = of(Offer, said)[-1]
    return [*said, *desk.tell(Accepted(sha256=offer.blob.sha256, round=number))]


def change(desk: Desk) -> Adapter:
    assert desk.disk.personal is not None
    found = desk.disk.personal[1]
    assert found is not None
    return codec.decode(found)


@pytest.mark.parametrize("way", [FINETUNE, BESIDE])
def test_a_device_goes_on_with_its_own_adapter_between_rounds(desk: Desk, way: PersonalSpec) -> None:
    personal = way.model_copy(update={"every": 2})
    assert "personalising" not in states(go_on(desk, adapter(1), 1, personal))
    assert desk.disk.personal is None
    assert "personalising" in states(go_on(desk, adapter(2), 2, personal))
    first = dense(change(desk))
    assert all(product.any() for product in first.values())
    go_on(desk, adapter(3), 4, personal)
    moved = dense(change(desk))
    assert any(np.abs(moved[name] - product).max() > 1e-4 for name, product in first.items())


def test_an_answer_that_comes_after_the_end_was_fetched_for_starts_nothing(desk: Desk) -> None:
    """The end does not wait for the answer to the last update, and its bands take the place of the former ones."""
    personal = FINETUNE.model_copy(update={"every": 1})
    offer = of(Offer, desk.tell(desk.publish(adapter(1), personal=personal), WELCOME))[-1]
    last = desk.publish(adapter(2), "finish", 1, version=1, personal=personal)
    [*chunks] = [topic for topic in desk.broker.retained if "/blob/" in topic]
    held = {topic: desk.broker.retained[topic] for topic in chunks}
    for topic in chunks:
        desk.server.publish(topic, b"", retain=True)
    desk.tell(last, Accepted(sha256=offer.blob.sha256, round=1))
    assert desk.trainer.rounds == [1]
    for topic, payload in held.items():
        desk.server.publish(topic, payload, retain=True)
    assert of(Report, desk.work())[-1].state == "done"


@pytest.mark.parametrize("way", [FINETUNE, BESIDE])
def test_what_it_learnt_for_itself_is_in_the_next_version_too(desk: Desk, way: PersonalSpec) -> None:
    """Without another step, on a version that is the former one in another gauge: the same function."""
    first = Adapter({name: to_pair(decompose([(1.0, cut(pair, 4))]), 0, 8) for name, pair in adapter(2).items()})
    whole = Adapter({name: in_another_gauge(pair, 4) for name, pair in first.items()})
    go_on(desk, first, 1, way.model_copy(update={"every": 1, "steps": 60}))
    before, kept = received(desk, desk.publish(first)), change(desk)
    none = directive().training.model_copy(update={"max_steps": 0})
    finished(desk, whole, way, training=none)
    for name, product in dense(desk.trainer.live).items():
        personal = before[name].product() + kept[name].product()
        # The bands travel in int8, and so does each gauge for itself.
        assert np.linalg.norm(product - personal) < 0.1 * np.linalg.norm(kept[name].product())


def in_another_gauge(pair: Pair, count: int) -> Pair:
    """The same product, the first directions turned."""
    by = np.eye(pair.rank)
    by[:count, :count] = np.linalg.qr(np.random.default_rng(0).standard_normal((count, count)))[0]
    return Pair((by @ pair.a).astype(np.float32), (pair.b @ by.T).astype(np.float32))


@pytest.mark.parametrize("way", [FINETUNE, BESIDE])
def test_the_pull_is_to_the_fleet_and_not_to_where_it_began(desk: Desk, way: PersonalSpec) -> None:
    every = way.model_copy(update={"every": 1})
    go_on(desk, adapter(2), 1, every)
    kept = change(desk)
    go_on(desk, adapter(2), 2, every)
    first, away = (found for found in desk.trainer.personal if found is not None)
    assert not first
    same(away, kept)


@pytest.mark.parametrize("way", [FINETUNE, BESIDE])
def test_a_restart_before_the_end_begins_with_what_is_its_own(desk: Desk, way: PersonalSpec) -> None:
    go_on(desk, adapter(2), 1, way.model_copy(update={"every": 1}))
    kept = change(desk)
    desk.restart()
    finished(desk, adapter(3), way)
    away = desk.trainer.personal[-1]
    assert away is not None
    if way is BESIDE:
        same(away, kept)
    assert away, "it began away from the fleet's"


def test_a_device_that_is_asked_again_makes_the_same_adapter_again_without_training(desk: Desk) -> None:
    done = finished(desk, adapter(2))
    trained, live = list(desk.trainer.rounds), desk.trainer.live
    desk.restart()
    again = finished(desk, adapter(2))
    assert desk.trainer.rounds == trained
    same(desk.trainer.live, live)
    assert again.held_out.model_dump(exclude={"base"}) == done.held_out.model_dump(exclude={"base"})
    assert (again.way, again.delivered) == (done.way, done.delivered)


def test_a_kill_before_all_is_done_begins_with_what_it_began_with(desk: Desk) -> None:
    desk.failure = RuntimeError("killed while it exports")
    with pytest.raises(RuntimeError, match="killed"):
        finished(desk, adapter(2))
    live = desk.trainer.live
    assert desk.disk.personal is None
    desk.failure = None
    desk.restart()
    finished(desk, adapter(2))
    assert desk.trainer.live.digest() == live.digest()


def test_another_life_of_the_fleet_does_not_get_it(desk: Desk) -> None:
    go_on(desk, adapter(2), 1, FINETUNE.model_copy(update={"every": 1}))
    assert desk.disk.personal is not None
    finished(desk, adapter(2), run="another")
    assert not desk.trainer.personal[-1]


def test_another_base_does_not_get_it(desk: Desk) -> None:
    go_on(desk, adapter(2), 1, FINETUNE.model_copy(update={"every": 1}))
    desk.trainer._base = "c" * 64
    desk.restart()
    finished(desk, adapter(3))
    assert desk.trainer.personal[-1] is not None
    assert not desk.trainer.personal[-1]


# ── what cannot be ────────────────────────────────────────────────────────────────────────────────────────────────

OWN = SPEC.model_copy(update={"own": 2})
CORE = SPEC.model_copy(update={"core": 4})
DENSE = SPEC.model_copy(update={"family": "bitfit"})


@pytest.mark.parametrize(
    ("own", "changes", "named"),
    [
        ({"way": "finetune"}, {"private": "b"}, "private_factor.*personal_way = 'finetune'"),
        ({"way": "beside"}, {"adapter": OWN}, "two_level.*personal_way = 'beside'"),
        ({"way": "two_level"}, {}, "'two_level'.*finetune, beside"),
        ({"way": "private_factor"}, {}, "'private_factor'.*finetune, beside"),
        ({}, {"personal": PersonalSpec(way="magic")}, "magic.*finetune"),
        ({"way": "beside"}, {"adapter": DENSE}, "'beside' needs.*'lora'.*'bitfit'"),
        ({"proximal": 0.1}, {"adapter": DENSE}, "proximal.*'lora'.*'bitfit'"),
        ({"way": "beside"}, {"adapter": CORE}, "cores.*'beside'"),
    ],
)
def test_what_a_device_cannot_have_is_refused_by_name(own: Any, changes: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ways.asked(directive(**changes), ways.Own(**own))


def test_it_is_refused_before_anything_is_planned(desk: Desk) -> None:
    own_choice(desk, ways.Own(way="two_level"))
    with pytest.raises(ConfigError, match="two_level"):
        desk.tell(directive("gather", 0))
    assert desk.trainer.specs == []


@pytest.mark.parametrize(
    ("changes", "way"), [({}, "finetune"), ({"private": "b"}, "private_factor"), ({"adapter": OWN}, "two_level")]
)
def test_a_server_that_says_nothing_leaves_the_way_to_its_method(changes: Any, way: str) -> None:
    assert ways.asked(directive(**changes), ways.Own()).way == way


def test_personal_training_is_tied_to_no_round() -> None:
    """Neither the pull nor the memory of rounds has a meaning in it."""
    tied = directive().training.model_copy(
        update={"proximal": 1.0, "correction": 1.0, "carry_moments": True, "kept": 0.5, "tail_penalty": 1.0}
    )
    asked = ways.asked(directive(training=tied, personal=PersonalSpec(proximal=0.25)), ways.Own())
    found = ways.training_of(asked, directive(training=tied), 5, "b")
    free = (found.correction, found.carry_moments, found.kept, found.tail_penalty)
    assert (found.max_steps, found.proximal, found.factors) == (5, 0.25, "b")
    assert free == (0.0, False, 1.0, 0.0)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("personal.way=magic", r"personal\.way: .*'beside'.*found 'magic'"),
        ("personal.wya=beside", r"'wya' \(did you mean 'way'\?\)"),
        ("personal.rank=0", r"personal\.rank: .*found 0"),
        ("personal.proximal=-1", r"personal\.proximal: .*found -1"),
        ("device.personal_way=magic", r"device\.personal_way: .*found 'magic'"),
    ],
)
def test_a_file_that_says_nonsense_is_refused_by_name(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config.load(None, [override])


def test_what_a_devices_file_leaves_out_is_the_fleets(tmp_path: Path) -> None:
    file = tmp_path / "device.toml"
    file.write_text('[device]\npersonal_way = "beside"\nkeep_better = false\n', encoding="utf-8")
    assert client._own(config.load(file).device) == ways.Own(way="beside", keep_better=False)
    assert client._own(config.load().device) == ways.Own()
