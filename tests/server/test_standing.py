"""The state of the rounds on disk: what changed is written, and what was written is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from hypothesis import given, settings

from server import standing
from server.fleet import Member
from server.policy import Policy
from server.state import State, put
from server.store import Store
from tests.runtime.said import BASE, hello, report
from tests.server.life import Life
from tests.server.test_rounds_laws import moves, policies


@settings(max_examples=40, deadline=None)
@given(policies, moves)
def test_what_changed_is_enough_to_bring_any_state_back(rules: Policy, sequence: list[tuple[str, int, int]]) -> None:
    life, written, rows = Life(rules), None, dict[str, str]()
    for move in sequence:
        life.move(*move)
        found = standing.dump(life.state, written)
        rows |= found.members
        written = life.state
        assert standing.load(found.text, rows.items()) == life.state


def test_one_member_of_many_is_one_row() -> None:
    state = State(run="one", base=BASE)
    for index in range(50):
        state = put(state, Member(hello=hello(f"d{index}")))
    member = state.members["d7"]
    after = put(state, member.model_copy(update={"online": False}))
    found = standing.dump(after, state)
    assert set(found.members) == {"d7"}
    assert "d7" not in found.text
    assert len(standing.dump(after).members) == 50


def test_members_that_say_the_same_share_what_they_said(tmp_path: Path) -> None:
    store, state = Store(tmp_path), State(run="one", base=BASE)
    for name in ("a", "b"):
        state = put(state, Member(hello=hello(name)))
    store.save_rounds(standing.dump(state))
    text = store.rounds()
    assert text is not None
    found = standing.load(text, store.members())
    assert found == state
    assert found.members["a"].hello.groups is found.members["b"].hello.groups
    store.close()


FORMER: Mapping[str, object] = {
    "run": "one",
    "phase": "train",
    "round": 3,
    "version": 2,
    "base": BASE,
    "members": {name: {"hello": hello(name).model_dump(mode="json"), "online": name != "c"} for name in "abcde"},
    "asked": ["a", "b", "c"],
    "stored": {"a": "1" * 64},
    "merged": {"a": "0" * 64, "b": "2" * 64},
    "ended": {"e": report("e", "done").model_dump(mode="json")},
    "paused": {"b": 5.0},
    "progress_at": 7.0,
}
"""A state as the second layout kept it: all in one text."""


def test_a_state_of_the_second_layout_goes_on_where_it_was() -> None:
    found = standing.load(json.dumps(FORMER), [])
    assert (found.phase, found.round, found.version, found.filled) == ("train", 3, 2, 1)
    assert found.asked == ("a", "b", "c"), "a device that was away meanwhile is waited for; who was not asked is not"
    assert found.late == ("b", "c")
    assert found.stored == {"a": "1" * 64}
    assert found.paused == {"b": 5.0}
    assert set(found.ended) == {"e"}
    assert (found.members["b"].delivered, found.members["b"].sha256) == (2, "2" * 64)
    assert standing.load(*_written(found)) == found


def _written(state: State) -> tuple[str, list[tuple[str, str]]]:
    found = standing.dump(state)
    return found.text, list(found.members.items())
