"""The promises of every transport, kept by the twin in memory and over both real brokers; and how topics match."""

from __future__ import annotations

import re
from collections.abc import Callable
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import BrokerError
from edge_runtime.wire.transport import Delivery, Transport, Will, check_pattern, check_topic, matches
from tests.wire.conftest import Clients

NAMES = st.sampled_from(["a", "b", "ab", "", "$a", "a b", "é"])
TOPICS = st.lists(NAMES, min_size=1, max_size=4).map("/".join).filter(bool)


@st.composite
def patterns(draw: st.DrawFn) -> str:
    """Valid patterns over the same few names as TOPICS, so that many match."""
    levels = draw(st.lists(NAMES | st.just("+"), max_size=4))
    levels += ["#"] if not levels or draw(st.booleans()) else []
    return "/".join(levels) or "+"


def reference(pattern: str, topic: str) -> bool:
    """MQTT 3.1.1 §4.7 as a regular expression."""
    expression = re.escape(pattern).replace(r"\+", "[^/]*").replace("+", "[^/]*")
    expression = re.sub(r"(^|/)(\\)?#$", lambda match: "(/.*)?" if match[1] else ".*", expression)
    if pattern[0] in "+#" and topic[0] == "$":
        return False
    return re.fullmatch(expression, topic, re.DOTALL) is not None


@given(patterns(), TOPICS)
def test_matching_agrees_with_the_standard(pattern: str, topic: str) -> None:
    """`matches` is the regular expression that §4.7 describes."""
    check_pattern(pattern)
    check_topic(topic)
    assert matches(pattern, topic) == reference(pattern, topic)


@given(TOPICS)
def test_a_topic_matches_itself_and_all_that_covers_it(topic: str) -> None:
    """A topic is covered by itself, by `#` on it and on its parent, and not by a level below it."""
    assert matches(topic, topic)
    assert matches(f"{topic}/#", topic)
    assert matches(topic.rsplit("/", 1)[0] + "/#", topic)
    assert not matches(f"{topic}/+", topic)


@pytest.mark.parametrize(
    ("pattern", "topic", "expected"),
    [
        ("sport/tennis/player1/#", "sport/tennis/player1", True),
        ("sport/tennis/+", "sport/tennis/player1/ranking", False),
        ("sport/+", "sport", False),
        ("sport/+", "sport/", True),
        ("+/+", "/finance", True),
        ("/+", "/finance", True),
        ("+", "/finance", False),
        ("#", "$SYS/broker", False),
        ("+/broker", "$SYS/broker", False),
        ("$SYS/#", "$SYS/broker", True),
    ],
)
def test_the_examples_of_the_standard(pattern: str, topic: str, expected: bool) -> None:
    """The examples that MQTT 3.1.1 gives in §4.7."""
    assert matches(pattern, topic) is expected


@pytest.mark.parametrize("pattern", ["", "a/#/b", "a#", "a/+b", "a/b+", "+a", "##", "a\0", "a" * 65_536])
def test_patterns_that_no_broker_takes_are_refused(pattern: str) -> None:
    """A wildcard fills its level, and `#` stands last."""
    with pytest.raises(ValueError, match="pattern"):
        check_pattern(pattern)


@pytest.mark.parametrize("topic", ["", "a/+", "#", "a\0", "é" * 32_768])
def test_topics_that_no_broker_takes_are_refused(topic: str) -> None:
    """A topic is one to 65,535 bytes, without wildcards."""
    with pytest.raises(ValueError, match="topic"):
        check_topic(topic)


def take(transport: Transport, count: int) -> list[Delivery]:
    """The next `count` deliveries, acknowledged."""
    deliveries: list[Delivery] = []
    for _ in range(count):
        delivery = transport.receive(10)
        assert delivery is not None, f"only {len(deliveries)} of {count} arrived"
        delivery.ack()
        deliveries.append(delivery)
    return deliveries


def nothing_else(transport: Transport, other: Transport, topic: str) -> None:
    """Assert that nothing is on its way to `transport` but what `other` now publishes on a subscribed topic."""
    other.publish(topic, b"end of test")
    assert [delivery.payload for delivery in take(transport, 1)] == [b"end of test"]
    # NATS keeps no order between subscriptions, so a moment more.
    assert transport.receive(0.1) is None


def test_what_is_published_arrives_in_order(clients: Clients) -> None:
    """Every payload, once, in order, and counted alike at both ends."""
    one, two = clients.connect("one"), clients.connect("two")
    two.subscribe("a/b")
    for n in range(100):
        one.publish("a/b", str(n).encode() * n)
    assert one.flush(10)
    arrived = take(two, 100)
    assert [delivery.payload for delivery in arrived] == [str(n).encode() * n for n in range(100)]
    assert {(delivery.topic, delivery.retained) for delivery in arrived} == {("a/b", False)}
    assert two.bytes_received == one.bytes_sent == sum(3 + len(str(n)) * n for n in range(100))
    assert two.receive(0) is None


def test_retained_messages_wait_for_late_subscribers_and_only_the_last_of_a_topic(clients: Clients) -> None:
    """A late subscriber gets the last retained message of each topic, and sees that it was kept."""
    one, early, late = clients.connect("one"), clients.connect("early"), clients.connect("late")
    early.subscribe("r/#")
    one.publish("r/x", b"old", retain=True)
    one.publish("r/x", b"new", retain=True)
    one.publish("r/y", b"other", retain=True)
    one.publish("r/z", b"passing")
    assert one.flush(10)
    assert [delivery.retained for delivery in take(early, 4)] == [False] * 4
    late.subscribe("r/#")
    assert {(d.topic, d.payload, d.retained) for d in take(late, 2)} == {("r/x", b"new", True), ("r/y", b"other", True)}
    nothing_else(late, one, "r/end")


def test_an_empty_retained_message_clears_the_topic(clients: Clients) -> None:
    """Nothing of a cleared topic reaches a late subscriber, but that it is cleared.

    NATS acknowledges a message before all its parts have it, so a clearing itself may still be on its way.
    """
    one, late = clients.connect("one"), clients.connect("late")
    for n in range(20):
        one.publish(f"r/{n}", bytes(1000), retain=True)
    for n in range(20):
        one.publish(f"r/{n}", b"", retain=True)
    assert one.flush(10)
    late.subscribe("r/+")
    one.publish("r/end", b"end of test")
    payloads = [take(late, 1)[0].payload]
    while payloads[-1] != b"end of test":
        payloads += [take(late, 1)[0].payload]
    assert set(payloads) <= {b"", b"end of test"}
    assert late.receive(0.1) is None


def test_wildcards_select_what_they_match(clients: Clients) -> None:
    """Brokers and `matches` agree on who receives what."""
    published = ["f/1/up", "f/2/up", "f/1/down", "f/1/blob/9/0", "g/1/up", "f"]
    one = clients.connect("one")
    wanted = ["f/+/up", "f/1/#", "f/#", "f/1/down"]
    for name, pattern in enumerate(wanted):
        clients.connect(f"sub{name}").subscribe(pattern)
    for topic in published:
        one.publish(topic, topic.encode())
    for pattern, transport in zip(wanted, clients.open[1:], strict=True):
        expected = [topic for topic in published if matches(pattern, topic)]
        assert sorted(delivery.topic for delivery in take(transport, len(expected))) == sorted(expected)
        transport.subscribe("end")
        nothing_else(transport, one, "end")


def test_a_session_collects_messages_while_its_client_is_away(clients: Clients) -> None:
    """A client that closed and came back finds all that was published meanwhile."""
    one, away = clients.connect("one"), clients.connect("away")
    away.subscribe("q/#")
    away.close()
    for n in range(200):
        one.publish("q/x", str(n).encode())
    assert one.flush(10)
    back = clients.connect("away")
    # NATS sends the first of them to the old connection when it has not yet noticed the end, and again later.
    assert sorted(int(delivery.payload) for delivery in take(back, 200)) == list(range(200))


def test_only_what_was_not_acknowledged_is_delivered_again(clients: Clients) -> None:
    """An acknowledged message stays away; an unacknowledged one comes again to the next connection."""
    one, two = clients.connect("one"), clients.connect("two")
    two.subscribe("u")
    for name in (b"stored", b"lost"):
        one.publish("u", name)
    stored, lost = two.receive(10), two.receive(10)
    assert stored is not None
    assert lost is not None
    stored.ack()
    stored.ack()
    # NATS forgets an acknowledgement that a disconnect follows at once, so something else first.
    two.publish("other", b"")
    assert two.flush(10)
    two.close()
    again = clients.connect("two")
    assert [delivery.payload for delivery in take(again, 1)] == [b"lost"]
    nothing_else(again, one, "u")


def test_an_acknowledgement_from_before_a_reconnect_does_no_harm(clients: Clients) -> None:
    """It acknowledges nothing of the new session, so nothing is lost by it."""
    one, two = clients.connect("one"), clients.connect("two")
    two.subscribe("u")
    one.publish("u", b"first")
    before = two.receive(10)
    assert before is not None
    clients.cut(two)
    clients.mend(two, 2)
    before.ack()
    one.publish("u", b"second")
    payloads = {delivery.payload for delivery in take(two, 1)}
    while b"second" not in payloads or (b"first" not in payloads and clients.kind != "memory"):
        payloads |= {delivery.payload for delivery in take(two, 1)}
    nothing_else(two, one, "u")


def test_a_will_is_published_when_the_link_breaks_and_not_when_it_is_closed(clients: Clients) -> None:
    """The will speaks for a client that cannot, and is retained."""
    watcher = clients.connect("watcher")
    watcher.subscribe("status/+")
    left = clients.connect("left", Will("status/left", b"offline"))
    left.publish("status/left", b"bye", retain=True)
    assert left.flush(10)
    left.close()
    lost = clients.connect("lost", Will("status/lost", b"offline"))
    clients.cut(lost)
    assert [(d.topic, d.payload) for d in take(watcher, 2)] == [("status/left", b"bye"), ("status/lost", b"offline")]
    late = clients.connect("late")
    late.subscribe("status/lost")
    assert [(delivery.payload, delivery.retained) for delivery in take(late, 1)] == [(b"offline", True)]


def test_a_broken_link_is_mended_with_all_that_was_asked_meanwhile(clients: Clients) -> None:
    """Publishing, subscribing and unsubscribing without a link happen when it is back."""
    one, two = clients.connect("one"), clients.connect("two")
    two.subscribe("before/+")
    two.subscribe("dropped")
    clients.cut(two)
    two.publish("to/one", b"sent while away")
    two.subscribe("during/+")
    two.unsubscribe("dropped")
    one.subscribe("to/+")
    clients.mend(two, 2)
    assert two.flush(10)
    assert [delivery.payload for delivery in take(one, 1)] == [b"sent while away"]
    two.subscribe("settled")
    for topic in ("dropped", "before/x", "during/x"):
        one.publish(topic, topic.encode())
    assert sorted(delivery.topic for delivery in take(two, 2)) == ["before/x", "during/x"]
    nothing_else(two, one, "settled")


def test_what_is_unsubscribed_stays_away(clients: Clients) -> None:
    """Other subscriptions of the same client go on."""
    one, two = clients.connect("one"), clients.connect("two")
    two.subscribe("a")
    two.subscribe("b")
    two.unsubscribe("a")
    two.subscribe("c")
    for topic in ("a", "b"):
        one.publish(topic, b"")
    assert [delivery.topic for delivery in take(two, 1)] == ["b"]
    nothing_else(two, one, "c")


def test_many_threads_may_publish_through_one_transport(clients: Clients) -> None:
    """Nothing is lost or mixed, and each thread's messages stay in order."""
    one, two = clients.connect("one"), clients.connect("two")
    two.subscribe("t/+")

    def publish(thread: int) -> None:
        for n in range(100):
            one.publish(f"t/{thread}", str(n).encode())

    threads = [Thread(target=publish, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    arrived = take(two, 400)
    for thread in threads:
        thread.join()
    for name in range(4):
        assert [int(d.payload) for d in arrived if d.topic == f"t/{name}"] == list(range(100))


def test_a_closed_transport_says_so(clients: Clients) -> None:
    """Closing wakes whoever waits, and every later use is an error."""
    transport = clients.connect("one")
    states = [transport.connected]
    ended: list[BrokerError] = []

    def wait() -> None:
        try:
            transport.receive(60)
        except BrokerError as error:
            ended.append(error)

    waiting = Thread(target=wait)
    waiting.start()
    transport.close()
    waiting.join(10)
    states.append(transport.connected)
    assert (len(ended), states) == (1, [True, False])
    uses: list[Callable[[], object]] = [
        lambda: transport.publish("a", b""),
        lambda: transport.subscribe("a"),
        lambda: transport.unsubscribe("a"),
        lambda: transport.receive(0),
    ]
    for use in uses:
        with pytest.raises(BrokerError, match="closed"):
            use()
    transport.close()


def test_bad_topics_are_refused_before_they_are_sent(clients: Clients) -> None:
    """A bad topic is an error of the caller, and the connection lives on."""
    transport = clients.connect("one")
    with pytest.raises(ValueError, match="topic"):
        transport.publish("a/+", b"")
    with pytest.raises(ValueError, match="pattern"):
        transport.subscribe("a/#/b")
    assert transport.bytes_sent == 0
