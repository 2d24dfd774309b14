"""Topics: what is built is parsed, what is parsed could have been built, and no name escapes its level."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError
from edge_runtime.wire import topics
from edge_runtime.wire.topics import Topic
from tests.strategies import digests, laws, names

chunks = st.integers(0, 10**10 - 1)

BUILD: dict[str, Callable[[str, Topic], str]] = {
    "round": lambda fleet, _: topics.directive(fleet),
    "blob": lambda fleet, topic: topics.broadcast(fleet, topic.digest, topic.chunk),
    "status": lambda fleet, topic: topics.status(fleet, topic.client),
    "up": lambda fleet, topic: topics.up(fleet, topic.client),
    "down": lambda fleet, topic: topics.down(fleet, topic.client),
    "upload": lambda fleet, topic: topics.upload(fleet, topic.client, topic.digest, topic.chunk),
}
"""How each kind of topic is built."""

KINDS: dict[str, st.SearchStrategy[Topic]] = {
    "round": st.just(Topic("round")),
    "blob": st.builds(Topic, st.just("blob"), st.just(""), digests, chunks),
    "status": st.builds(Topic, st.just("status"), names),
    "up": st.builds(Topic, st.just("up"), names),
    "down": st.builds(Topic, st.just("down"), names),
    "upload": st.builds(Topic, st.just("upload"), names, digests, chunks),
}
"""Every topic of each kind."""


@pytest.mark.parametrize("kind", sorted(KINDS))
@laws
@given(st.data(), names)
def test_what_is_built_is_parsed(kind: str, data: st.DataObject, fleet: str) -> None:
    topic = data.draw(KINDS[kind])

    assert topics.parse(fleet, BUILD[kind](fleet, topic)) == topic


@pytest.mark.parametrize("kind", sorted(KINDS))
@laws
@given(st.data())
def test_a_topic_of_another_fleet_is_nobodys(kind: str, data: st.DataObject) -> None:
    built = BUILD[kind]("theirs", data.draw(KINDS[kind]))

    assert topics.parse("ours", built) is None
    assert topics.parse("their", built) is None


levels = st.sampled_from(
    ["edge", "fleet", "round", "blob", "c", "status", "up", "down", "pi-1", "0" * 64, "F" * 64, "0", "17", "007", "-1",
     "+1", "1_0", "\u0661", "\u00b2", "9" * 11, "", "+", "#", " ", "..", "a b", "pi\n", "0\n"]
)  # fmt: skip


@laws
@given(st.lists(levels, max_size=7).map("/".join) | st.text(max_size=30))
@example("edge/fleet/c/pi-1/blob/" + "0" * 64 + "/007")
@example("edge/fleet/c/pi-1/up/")
@example("/edge/fleet/round")
@example("edge/fleet/round\n")
@example("edge/fleet/c/+/up")
@example("edge/fleet/blob/" + "0" * 64 + "/" + "9" * 10_000)
def test_whatever_is_parsed_could_have_been_built(text: str) -> None:
    topic = topics.parse("fleet", text)

    assert topic is None or BUILD[topic.kind]("fleet", topic) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "edge",
        "edge/fleet",
        "edge/fleet/",
        "edge/fleet/rounds",
        "edge/fleet/round/1",
        "edge/fleet/c/pi",
        "edge/fleet/c/pi/UP",
        "edge/fleet/c//up",
        "edge/fleet/c/+/status",
        "edge/fleet/blob/" + "0" * 63 + "/1",
        "edge/fleet/blob/" + "0" * 64,
        "edge/fleet/blob/" + "0" * 64 + "/+",
        "edge/fleet/blob/" + "0" * 64 + "/-1",
        "edge/fleet/blob/" + "0" * 64 + "/1.0",
        "edge/fleet/c/pi/blob/" + "0" * 64 + "/" + "9" * 11,
        "$SYS/fleet/round",
        "EDGE/fleet/round",
        topics.link("fleet", "pi", 0),
    ],
)
def test_a_strangers_topic_is_nobodys(text: str) -> None:
    assert topics.parse("fleet", text) is None


def matches(pattern: str, topic: str) -> bool:
    """MQTT's rule, 4.7.1: '+' is one level, '#' the rest."""
    wanted, found = pattern.split("/"), topic.split("/")
    if wanted[-1] == "#":
        return found[: len(wanted) - 1] == wanted[:-1]
    return len(wanted) == len(found) and all(w in ("+", f) for w, f in zip(wanted, found, strict=True))


@pytest.mark.parametrize("kind", sorted(KINDS))
@laws
@given(st.data(), names)
def test_a_pattern_matches_the_topics_it_stands_for_and_no_others(kind: str, data: st.DataObject, fleet: str) -> None:
    topic = data.draw(KINDS[kind])
    built = BUILD[kind](fleet, topic)
    patterns = {
        "blob": topics.broadcast(fleet, topic.digest),
        "status": topics.status(fleet, "+"),
        "up": topics.up(fleet, "+"),
        "upload": topics.upload(fleet, "+", "+"),
    }

    assert {k for k, pattern in patterns.items() if matches(pattern, built)} == {kind} & patterns.keys()
    assert matches(topics.everything(fleet), built)
    assert not matches(topics.everything(fleet + "x"), built)


@laws
@given(names)
def test_a_valid_name_is_returned_as_it_is(name: str) -> None:
    assert topics.valid_name(name, "client") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "a/b",
        "+",
        "a+",
        "#",
        "a#",
        " a",
        "a b",
        ".a",
        "-a",
        "_a",
        "$SYS",
        "a\n",
        "a\0",
        "\u00e9",
        "\u0663",
        "x" * 65,
    ],
)
def test_a_name_that_is_no_level_of_a_topic_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="fleet is 1 to 64") as refusal:
        topics.valid_name(name, "fleet")

    assert repr(name) in str(refusal.value)


@laws
@given(st.text(max_size=70))
def test_no_valid_name_leaves_its_level_or_matches_another(name: str) -> None:
    try:
        valid = topics.valid_name(name, "client")
    except ConfigError:
        return
    assert topics.parse("fleet", topics.up("fleet", valid)) == Topic("up", valid)
    assert topics.parse(valid, topics.directive(valid)) == Topic("round")
