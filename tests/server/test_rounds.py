"""The rounds as a pure machine: each answer and each rule by example."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from edge_runtime.wire.messages import Accepted, Hello, Message, Offer, Rejected, Welcome, group
from edge_runtime.wire.sampling import number_of
from server import rounds
from server.events import (
    Action,
    Announce,
    Heard,
    Merge,
    Moved,
    Note,
    PresenceChanged,
    Refused,
    Reply,
    Stage,
    Stored,
    Tick,
)
from server.offers import MAX_CHUNKS
from tests.runtime.said import BASE, hello, offer, report, slot
from tests.server.life import TIMEOUT, Life, announced, policy


def training(clients: Iterable[str] = "abc", **rules: Any) -> Life:
    """A fleet whose first round is open and asks everybody."""
    names = tuple(clients)
    life = Life(policy(min_available_nodes=len(names), **rules))
    for client in names:
        life.happen(Heard(hello(client)))
    assert (life.state.phase, life.state.round) == ("train", 1)
    return life


def deliver(life: Life, client: str) -> list[Action]:
    """A device's update of the open round arrives and is stored."""
    update = offer(client, life.state.round)
    life.happen(Heard(update))
    return life.happen(Stored(update))


def answer(life: Life, said: Hello | Offer) -> Message | Stage:
    [found] = [action for action in life.happen(Heard(said)) if isinstance(action, Reply | Stage)]
    return found.message if isinstance(found, Reply) else found


def code(life: Life, said: Hello | Offer) -> str:
    found = answer(life, said)
    assert isinstance(found, Rejected)
    return found.code


def later(life: Life, seconds: float) -> list[Action]:
    life.now += seconds
    return life.happen(Tick())


def test_the_first_round_begins_once_enough_devices_are_online() -> None:
    life = Life(policy(min_available_nodes=2))
    life.happen(Heard(hello("a")))
    life.happen(PresenceChanged("a", online=False))
    life.happen(Heard(hello("b")))
    assert life.phase == "gather"
    actions = life.happen(PresenceChanged("a", online=True))
    assert (life.state.phase, life.state.round, life.state.asked) == ("train", 1, ("a", "b"))
    assert announced(actions)


def test_the_file_of_the_fleet_may_name_the_base_and_else_the_first_device_does() -> None:
    state, _ = rounds.begin("one", "c" * 64, 0.0)
    state, [reply, _] = rounds.step(state, Heard(hello("a")), 0.0, policy())
    assert isinstance(reply, Reply)
    assert isinstance(reply.message, Rejected)
    assert not state.members
    life = Life(policy())
    life.happen(Heard(hello("a")))
    assert life.state.base == BASE
    assert code(life, hello("b", base="c" * 64)) == "fingerprint"
    assert code(life, hello("b", groups=group(slot(d_in=20)))) == "shape"
    assert set(life.state.members) == {"a"}


def test_an_offer_is_staged_stored_and_from_then_on_accepted() -> None:
    life = training()
    update = offer("a")
    assert answer(life, update) == Stage(update)
    assert answer(life, update) == Stage(update), "said again before it is complete"
    life.happen(Stored(update))
    assert answer(life, update) == Accepted(sha256=update.blob.sha256, round=1)
    assert life.state.stored == {"a": update.blob.sha256}


def test_offers_that_are_late_foreign_doubled_or_too_large_hear_why() -> None:
    life = training()
    deliver(life, "a")
    assert code(life, offer("x")) == "unknown-client"
    assert code(life, offer("b", 2)) == "round-closed"
    assert code(life, offer("a", payload=b"another one")) == "round-closed"
    assert code(life, offer("b").model_copy(update={"version": 7})) == "round-closed"
    assert code(life, offer("b", payload=b"x" * 1001)) == "too-large"
    deliver(life, "c")
    life.merge_done()
    assert code(life, offer("a", 1, payload=b"another one")) == "round-closed"
    assert isinstance(answer(life, offer("a", 1)), Accepted), "it is in the version, whatever its device heard"
    assert life.state.round == 2


def test_an_update_that_was_merged_is_accepted_again_however_late_the_device_asks() -> None:
    """It must not take an acknowledgement that was lost for a refusal, or it would send what it owed once more."""
    life = training()
    update = offer("a", 1)
    for client in "abc":
        deliver(life, client)
    life.merge_done()
    assert life.state.round == 2
    assert answer(life, update) == Accepted(sha256=update.blob.sha256, round=update.round)


def test_an_offer_of_too_many_chunks_is_refused_before_anybody_lists_them() -> None:
    life = training(max_upload_bytes=1 << 40)
    update = offer("a", chunk_bytes=1)
    huge = update.model_copy(update={"blob": update.blob.model_copy(update={"size": MAX_CHUNKS + 1})})
    assert code(life, huge) == "too-large"


def test_the_round_is_merged_as_soon_as_all_updates_are_there() -> None:
    life = training("abc")
    assert not any(isinstance(action, Merge) for client in "ab" for action in deliver(life, client))
    assert Merge(1) in deliver(life, "c")
    assert life.phase == "merging"
    life.merge_done()
    assert (life.state.phase, life.state.round, life.state.version, life.state.stored) == ("train", 2, 1, {})


def test_after_the_last_round_devices_finish_and_then_the_fleet_is_over() -> None:
    life = training("ab", num_rounds=1)
    for client in "ab":
        deliver(life, client)
    life.merge_done()
    assert (life.state.phase, life.state.version, life.state.asked) == ("finish", 1, ())
    life.happen(Heard(report("a", "done")))
    assert life.phase == "finish"
    assert announced(life.happen(Heard(report("b", "done"))))
    assert life.phase == "over"


def test_the_fleet_does_not_wait_for_the_personal_adapter_of_a_device_that_is_gone_or_silent() -> None:
    for how in ("offline", "silent"):
        life = training("ab", num_rounds=1)
        for client in "ab":
            deliver(life, client)
        life.merge_done()
        life.happen(Heard(report("a", "done")))
        if how == "offline":
            life.happen(PresenceChanged("b", online=False))
        else:
            later(life, TIMEOUT - 1)
            life.happen(Heard(report("b", "personalising")))
            later(life, TIMEOUT - 1)
            assert life.phase == "finish", "slow is not dead"
            later(life, 2)
        assert life.phase == "over"


# ── progress ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_round_waits_as_long_as_anything_moves() -> None:
    life = training("abc")
    deliver(life, "a")
    deliver(life, "b")
    for number in range(20):
        event = (Heard(report("c", "training", step=number)), Moved())[number % 2]
        assert life.happen(event) == []
        assert not any(isinstance(action, Merge) for action in later(life, TIMEOUT - 0.5))
    assert Merge(1) in later(life, 1.0)


def test_a_quorum_goes_on_without_those_who_stopped_and_names_them() -> None:
    life = training("abcd", quorum=0.5)
    deliver(life, "a")
    assert not any(isinstance(action, Merge) for action in later(life, TIMEOUT + 1))
    deliver(life, "b")
    actions = later(life, TIMEOUT + 1)
    assert Merge(1) in actions
    assert any(isinstance(action, Note) and "without c, d" in action.text for action in actions)


@pytest.mark.parametrize(("quorum", "needed"), [(0.01, 1), (0.5, 2), (0.51, 3), (1.0, 4)])
def test_a_round_never_goes_on_with_fewer_than_the_quorum(quorum: float, needed: int) -> None:
    life = training("abcd", quorum=quorum)
    for count, client in enumerate("abcd"[: needed - 1]):
        assert len(life.state.stored) == count
        assert not any(isinstance(action, Merge) for _ in range(3) for action in later(life, TIMEOUT + 1))
        deliver(life, client)
    assert life.phase == "train"
    assert not any(isinstance(action, Merge) for action in later(life, TIMEOUT + 1))
    deliver(life, "abcd"[needed - 1])
    later(life, TIMEOUT + 1)
    assert life.phase == "merging"


def test_without_a_quorum_the_directive_is_said_again_and_the_wait_begins_anew() -> None:
    life = training("abc")
    assert announced(later(life, TIMEOUT + 1))
    assert not announced(later(life, TIMEOUT - 1))
    assert announced(later(life, 2))


def test_a_device_that_only_repeats_itself_does_not_hold_up_the_round() -> None:
    """Its offers and hellos arrive, its chunks never do: some brokers drop what is too large for them."""
    life = training("abc")
    deliver(life, "a")
    deliver(life, "b")
    for said in (offer("c"), report("x", "planned"), hello("c"), offer("x"), hello("x", base="c" * 64)):
        life.now += TIMEOUT / 4
        life.happen(Heard(said))
    assert life.phase == "merging"


# ── who is waited for ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_device_that_failed_is_no_longer_waited_for_nor_asked_again() -> None:
    life = training("abc")
    deliver(life, "a")
    deliver(life, "b")
    assert Merge(1) in life.happen(Heard(report("c", "failed", detail="out of memory")))
    life.merge_done()
    assert life.asked == "ab"


def test_a_device_that_failed_and_is_back_takes_part_again() -> None:
    life = training("abc")
    life.happen(Heard(report("c", "failed")))
    assert life.asked == "ab"
    assert isinstance(answer(life, hello("c")), Welcome)
    assert life.asked == "abc"
    for client in "abc":
        deliver(life, client)
    life.merge_done()
    assert life.asked == "abc"


def test_a_device_whose_update_was_refused_is_not_waited_for() -> None:
    """It has given up this round, as the refusal tells it to."""
    life = training("abc", quorum=1.0)
    deliver(life, "a")
    update = offer("b")
    life.happen(Heard(update))
    life.happen(Refused(update, Rejected(code="corrupt", reason="bytes", sha256=update.blob.sha256)))
    assert code(life, offer("c", payload=b"x" * 1001)) == "too-large"
    assert life.phase == "merging"
    life.merge_done()
    assert life.asked == "abc", "the next round asks it again"


def test_a_refusal_of_a_late_update_does_not_excuse_the_device_from_the_open_round() -> None:
    life = training("ab", quorum=0.5)
    late = offer("b")
    life.happen(Heard(late))
    deliver(life, "a")
    later(life, TIMEOUT + 1)
    life.merge_done()
    life.happen(Refused(late, Rejected(code="corrupt", reason="bytes", sha256=late.blob.sha256)))
    assert life.asked == "ab"


def test_an_update_that_completes_after_its_round_closed_is_refused_and_belongs_to_no_other_round() -> None:
    life = training("ab", quorum=0.5)
    late = offer("b")
    life.happen(Heard(late))
    deliver(life, "a")
    later(life, TIMEOUT + 1)
    life.merge_done()
    [reply] = [action for action in life.happen(Stored(late)) if isinstance(action, Reply)]
    assert isinstance(reply.message, Rejected)
    assert (reply.client, reply.message.code) == ("b", "round-closed")
    assert life.state.stored == {}


def test_whoever_joins_late_is_asked_in_a_round_that_asks_everybody() -> None:
    life = training("ab")
    life.happen(Heard(hello("c")))
    assert life.asked == "abc"


def test_whoever_joins_late_is_asked_in_a_round_that_asks_a_few_if_its_number_is_one_of_theirs() -> None:
    """The directive cannot leave it out, for it names nobody; so it is waited for as well."""
    asked = set()
    for client in "efghijkl":
        chosen = training("abcd", fraction_train=0.5)
        before, sample = chosen.state.asked, chosen.state.sample
        chosen.happen(Heard(hello(client)))
        below = number_of(sample.seed, 1, client) < sample.below
        assert chosen.state.asked == (tuple(sorted((*before, client))) if below else before)
        asked.add(below)
    assert asked == {True, False}


def test_whoever_was_offline_when_the_round_began_takes_part_when_it_is_back() -> None:
    """The directive asks everybody, so its update is welcome, and it is waited for."""
    life = training("abc")
    life.happen(PresenceChanged("c", online=False))
    for client in "abc":
        deliver(life, client)
    life.merge_done()
    assert life.asked == "ab"
    update = offer("c", 2)
    assert answer(life, update) == Stage(update), "its presence may come after its offer"
    assert life.asked == "abc"
    life.happen(PresenceChanged("c", online=True))
    for client in "ab":
        deliver(life, client)
    assert life.phase == "train"
    life.happen(Stored(update))
    assert life.phase == "merging"


def test_whoever_comes_back_during_a_round_that_asks_everybody_is_waited_for() -> None:
    life = training("abc")
    life.happen(PresenceChanged("c", online=False))
    for client in "abc":
        deliver(life, client)
    life.merge_done()
    life.happen(PresenceChanged("c", online=True))
    assert life.asked == "abc"


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_a_round_that_began_while_nobody_was_there_asks_whoever_comes(fraction: float) -> None:
    life = training("abcd", fraction_train=fraction, quorum=0.5)
    for client in life.state.asked:
        deliver(life, client) if client != life.state.asked[-1] else None
    for client in "abcd":
        life.happen(PresenceChanged(client, online=False))
    later(life, TIMEOUT + 1)
    life.merge_done()
    assert (life.state.round, life.state.asked) == (2, ())
    life.happen(PresenceChanged("b", online=True))
    assert life.asked == "b"
    assert Merge(2) in deliver(life, "b")


def test_a_round_that_asks_a_few_asks_others_when_those_go_away() -> None:
    life = training("abcd", fraction_train=0.5, quorum=1.0)
    first = life.state.asked
    for client in first:
        life.happen(PresenceChanged(client, online=False))
    assert life.state.asked == first, "they may come back"
    assert announced(later(life, TIMEOUT + 1))
    assert set(life.state.asked) == set("abcd") - set(first)
    for client in life.state.asked:
        deliver(life, client)
    assert life.phase == "merging"


def test_nobody_online_is_replaced() -> None:
    life = training("abcd", fraction_train=0.5, quorum=1.0)
    first = life.state.asked
    for _ in range(3):
        later(life, TIMEOUT + 1)
    assert life.state.asked == first


# ── restarts ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_server_that_restarts_tells_the_fleet_where_it_stands_and_nothing_else() -> None:
    life = training("ab")
    deliver(life, "a")
    before = life.state
    state, actions = rounds.resume(before, 99.0)
    assert state == before.model_copy(update={"progress_at": 99.0})
    assert [type(action) for action in actions] == [Note, Announce]


def test_a_merge_that_was_begun_is_done_after_the_restart() -> None:
    life = training("ab")
    deliver(life, "a")
    deliver(life, "b")
    life.restart()
    assert life.pending_merge == 1
    life.merge_done()
    assert (life.state.round, life.state.version) == (2, 1)


def test_time_that_passed_while_the_server_was_down_is_nobodys_fault() -> None:
    life = training("ab")
    deliver(life, "a")
    life.now += 100 * TIMEOUT
    life.restart()
    assert not any(isinstance(action, Merge) for action in life.happen(Tick()))
