"""The device's protocol as a pure machine: each of its rules by example."""

from __future__ import annotations

from typing import Any

import pytest

from edge_runtime.agent import (
    Adopt,
    Fetch,
    Fetched,
    Finish,
    Leave,
    MakePlan,
    Received,
    Repeat,
    Say,
    SendChunks,
    Settle,
    Train,
)
from edge_runtime.wire import blobs
from edge_runtime.wire.messages import Band, Directive, Need, Offer, Rejected
from tests.runtime.pocket import OTHER_SPEC, WELCOME, Device, reply_to
from tests.runtime.said import SPEC, TRAINING, directive, hello, offer


def joined(first: Directive | None = None) -> Device:
    """A device that has planned and is welcome."""
    device = Device()
    device.happen(Received(first or directive("gather", 0)))
    device.complete()
    device.happen(Received(WELCOME))
    return device


def trained(round_number: int = 1) -> tuple[Device, Offer]:
    """A device whose update of that round waits to be accepted."""
    device = joined()
    device.happen(Received(directive("train", round_number)))
    device.complete()
    device.complete()
    assert device.state.outbox is not None
    return device, device.state.outbox


def test_a_whole_life() -> None:
    device, first = Device(), directive("train", 1)
    assert device.happen(Received(first)) == [Adopt("one"), MakePlan(SPEC, TRAINING)]
    assert device.complete() == [Say(hello("a"))]
    assert device.happen(Received(WELCOME)) == [Fetch(first)]
    assert device.complete() == [Train(first)]
    [said] = device.complete()
    assert isinstance(said, Say)
    assert isinstance(said.message, Offer)
    update = said.message
    assert device.happen(Received(reply_to(update, "need"))) == [SendChunks(update, ((0, 2),))]
    assert device.happen(Received(reply_to(update, "accepted"))) == [Settle(1)]
    last = directive("finish", 1, version=1)
    assert device.happen(Received(last)) == [Fetch(last)]
    assert device.complete() == [Finish(last)]
    assert device.complete() == [Leave()]
    assert device.state.left


def test_nothing_is_said_or_done_before_there_is_a_directive() -> None:
    device = Device()
    for event in (Repeat(), Received(WELCOME), Received(Need(sha256="0" * 64, ranges=((0, 1),)))):
        assert device.happen(event) == []


def test_a_device_that_is_not_asked_waits() -> None:
    device = joined()
    assert device.happen(Received(directive("train", 1, asked="bc"))) == []
    asked = directive("train", 2, asked="ac")
    assert device.happen(Received(asked)) == [Fetch(asked)]


def test_a_directive_that_comes_twice_has_no_effect() -> None:
    device = joined()
    first = directive("train", 1)
    assert device.happen(Received(first)) == [Fetch(first)]
    assert device.happen(Received(first)) == [], "while fetching"
    device.complete()
    assert device.happen(Received(first)) == [], "while training"
    device.complete()
    assert device.happen(Received(first)) == [], "while the update waits"
    assert device.state.outbox is not None
    device.happen(Received(reply_to(device.state.outbox, "accepted")))
    assert device.happen(Received(first)) == [], "once the round is settled"


@pytest.mark.parametrize("late", [directive("gather", 0), directive("train", 1)])
def test_an_older_directive_that_comes_late_has_no_effect(late: Directive) -> None:
    """A broker repeats it, or went back to an older memory; only a fleet that begins anew starts from the beginning."""
    device = joined()
    device.happen(Received(directive("train", 2)))
    before = device.state
    assert device.happen(Received(late)) == []
    assert device.state == before


def test_an_answer_that_comes_twice_or_belongs_to_another_update_has_no_effect() -> None:
    device, update = trained()
    other = offer("a", 1, payload=b"another")
    for kind in ("need", "accepted", "round-closed", "corrupt", "too-large"):
        assert device.happen(Received(reply_to(other, kind))) == []
    assert device.happen(Received(reply_to(update, "accepted"))) == [Settle(1)]
    for kind in ("need", "accepted", "round-closed", "corrupt", "too-large"):
        assert device.happen(Received(reply_to(update, kind))) == []


@pytest.mark.parametrize("kind", ["round-closed", "corrupt", "too-large"])
def test_a_refused_update_is_given_up_and_the_next_round_is_trained(kind: str) -> None:
    device, update = trained()
    assert device.happen(Received(reply_to(update, kind))) == [Settle(1, arrived=False)]
    following = directive("train", 2)
    assert device.happen(Received(following)) == [Fetch(following)]


def test_repeat_says_exactly_what_is_unanswered() -> None:
    device = Device()
    device.happen(Received(directive("train", 1)))
    assert device.happen(Repeat()) == [], "there is no plan to speak of yet"
    device.complete()
    for _ in range(3):
        assert device.happen(Repeat()) == [Say(hello("a"))]
    device.happen(Received(WELCOME))
    assert device.happen(Repeat()) == []
    device.complete()
    device.complete()
    update = device.state.outbox
    assert update is not None
    for _ in range(3):
        assert device.happen(Repeat()) == [Say(update)]
    device.happen(Received(reply_to(update, "need")))
    assert device.happen(Repeat()) == [Say(update)], "the chunks may be lost"
    device.happen(Received(reply_to(update, "accepted")))
    assert device.happen(Repeat()) == []


def test_after_a_restart_the_outbox_is_offered_as_soon_as_the_server_knows_us() -> None:
    device, update = trained()
    device.boot()
    device.happen(Received(directive("train", 1)))
    assert device.complete() == [Say(hello("a"))]
    assert device.happen(Received(WELCOME)) == [Say(update)]


def test_a_server_that_forgot_us_is_told_again_who_we_are_and_then_what_we_have() -> None:
    device, update = trained()
    assert device.happen(Received(reply_to(update, "unknown-client"))) == [Say(hello("a"))]
    assert device.happen(Repeat()) == [Say(hello("a"))]
    assert device.happen(Received(WELCOME)) == [Say(update)]


def test_a_settled_round_is_not_trained_again_after_a_restart() -> None:
    device, update = trained()
    device.happen(Received(reply_to(update, "accepted")))
    device.boot()
    device.happen(Received(directive("train", 1)))
    device.complete()
    assert device.happen(Received(WELCOME)) == []


def test_a_fetch_is_given_up_when_the_fleet_moves_on() -> None:
    """The bands of a former version may never come: a broker that forgot them is not told them again."""
    device = joined()
    device.happen(Received(directive("train", 1)))
    moved = directive("train", 2)
    assert device.happen(Received(moved)) == [Fetch(moved)]
    assert device.happen(Fetched(0)) == [], "the former version after all"
    assert device.complete() == [Train(moved)]


def band(version: int, chunk_bytes: int = 64) -> Band:
    return Band(start=0, stop=4, blob=blobs.describe(f"band of {version}".encode(), chunk_bytes))


def test_a_fetch_goes_on_while_updates_of_its_version_count() -> None:
    """A slow device would never have a version whole, if it began anew with each."""
    device = joined()
    first = directive("train", 1, max_staleness=2, bands=(band(0),))
    assert device.happen(Received(first)) == [Fetch(first)]
    for number in (2, 3):
        assert device.happen(Received(directive("train", number, max_staleness=2, bands=(band(number - 1),)))) == []
    assert device.happen(Fetched(0)) == [Train(first)]
    [said] = device.complete()
    assert isinstance(said, Say)
    update = said.message
    assert isinstance(update, Offer)
    assert (update.round, update.version) == (1, 0)
    [settled, fetch] = device.happen(Received(reply_to(update, "accepted")))
    assert settled == Settle(1)
    assert isinstance(fetch, Fetch)
    assert fetch.directive.round == 3


@pytest.mark.parametrize(
    "moved",
    [
        directive("train", 4, max_staleness=2, bands=(band(3),)),
        directive("train", 2, max_staleness=2, bands=(band(1, 32),)),
        directive("train", 2, max_staleness=0, bands=(band(1),)),
        directive("finish", 2, max_staleness=2, bands=(band(1),)),
    ],
    ids=["out of reach", "cut into other chunks", "of a fleet that waits", "the end"],
)
def test_a_fetch_of_what_counts_no_more_or_may_never_come_begins_anew(moved: Directive) -> None:
    device = joined()
    device.happen(Received(directive("train", 1, max_staleness=2, bands=(band(0),))))
    assert device.happen(Received(moved)) == [Fetch(moved)]
    assert device.happen(Fetched(0)) == []


def test_a_fetch_is_given_up_when_the_fleet_moves_on_without_us() -> None:
    device = joined()
    device.happen(Received(directive("train", 1)))
    assert device.happen(Received(directive("train", 2, asked="b"))) == []
    again = directive("train", 3)
    assert device.happen(Received(again)) == [Fetch(again)]


def test_what_was_fetched_is_not_trained_if_we_are_no_longer_asked() -> None:
    device = joined()
    device.happen(Received(directive("train", 1)))
    device.happen(Received(directive("train", 1, asked="b")))
    assert device.complete() == []


def test_a_fleet_that_began_anew_is_joined_anew() -> None:
    device, _ = trained(2)
    anew = directive("train", 1, run="two")
    assert device.happen(Received(anew)) == [Adopt("two"), Say(hello("a"))]
    assert (device.state.outbox, device.state.settled, device.state.welcomed) == (None, 0, False)
    assert device.happen(Received(WELCOME)) == [Fetch(anew)]


def test_an_update_that_was_trained_for_a_former_life_is_not_offered_in_this_one() -> None:
    device = joined()
    device.happen(Received(directive("train", 1)))
    device.complete()
    device.happen(Received(directive("train", 1, run="two")))
    device.happen(Received(WELCOME))
    actions = device.complete()
    assert [type(action) for action in actions] == [Fetch]
    assert device.state.outbox is None


def test_another_kind_of_adapter_is_planned_for_anew() -> None:
    """The fleet's file has changed, so what the device may hold has too."""
    device = joined()
    other = directive("train", 1, adapter=OTHER_SPEC)
    assert device.happen(Received(other)) == [MakePlan(OTHER_SPEC, TRAINING)]
    assert device.complete() == [Say(hello("a"))]
    assert device.happen(Received(WELCOME)) == [Fetch(other)]


def test_a_plan_that_is_asked_for_during_a_fetch_comes_first() -> None:
    device = joined()
    device.happen(Received(directive("train", 1)))
    assert device.happen(Received(directive("train", 1, adapter=OTHER_SPEC))) == [MakePlan(OTHER_SPEC, TRAINING)]


@pytest.mark.parametrize("code", ["fingerprint", "shape"])
def test_a_device_that_the_fleet_cannot_use_leaves(code: Any) -> None:
    device = Device()
    device.happen(Received(directive("train", 1)))
    device.complete()
    refusal = Rejected(code=code, reason="because")
    assert device.happen(Received(refusal)) == [Leave(refusal)]
    assert device.happen(Received(directive("train", 2))) == []


def test_a_device_that_comes_after_the_server_has_gone_still_finishes() -> None:
    """The last directive and its bands are retained; all that the server would add is that the base is right."""
    device, last = Device(), directive("finish", 3)
    device.happen(Received(last))
    assert device.complete() == [Say(hello("a")), Fetch(last)]
    assert device.complete() == [Finish(last)]


def test_a_device_of_another_base_does_not_finish_unasked() -> None:
    device = Device()
    device.happen(Received(directive("finish", 3, base="c" * 64)))
    assert device.complete() == [Say(hello("a"))]
