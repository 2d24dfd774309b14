"""What only the twin can do: fail on request, forget, and repeat itself exactly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import BrokerError
from edge_runtime.wire.memory import MemoryBroker, MemoryTransport
from edge_runtime.wire.transport import Will

STEPS = st.lists(st.sampled_from(["publish", "take", "take and lose", "drop", "resume", "restart", "new"]), max_size=40)


def drain(transport: MemoryTransport) -> list[bytes]:
    """All that waits, acknowledged."""
    payloads = []
    while (delivery := transport.receive(0)) is not None:
        delivery.ack()
        payloads.append(delivery.payload)
    return payloads


def play(steps: list[str]) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Published, acknowledged and drained payloads of a subscriber that fails as `steps` say."""
    broker = MemoryBroker()
    one, two = broker.connect("one"), broker.connect("two")
    two.subscribe("x")
    published: list[bytes] = []
    acknowledged: list[bytes] = []
    for step in steps:
        if step == "publish":
            published.append(str(len(published)).encode())
            one.publish("x", published[-1])
        elif step == "restart":
            broker.restart()
        elif step == "new":
            two = broker.connect("two")
        elif step in ("drop", "resume"):
            getattr(two, step)()
        elif (delivery := two.receive(0)) is not None and step == "take":
            delivery.ack()
            acknowledged.append(delivery.payload)
    two.drop()
    two.resume()
    return published, acknowledged, drain(two)


@given(STEPS)
def test_each_message_is_acknowledged_exactly_once_whatever_fails(steps: list[str]) -> None:
    """At least once, and never again once acknowledged; what waits stays in order."""
    published, acknowledged, rest = play(steps)
    assert sorted(acknowledged + rest) == sorted(published)
    assert rest == sorted(rest, key=int)


@given(STEPS)
def test_the_same_calls_give_the_same_deliveries(steps: list[str]) -> None:
    """There is no chance in the twin."""
    assert play(steps) == play(steps)


def test_a_broker_that_forgot_everything_learns_the_subscriptions_again() -> None:
    """Transports remember for a broker that does not."""
    broker = MemoryBroker()
    one, two = broker.connect("one"), broker.connect("two")
    two.subscribe("x/+")
    one.publish("x/kept", b"1", retain=True)
    broker.restart(forget=True)
    assert (one.sessions, two.sessions) == (2, 2)
    assert broker.retained == {}
    one.publish("x/new", b"2")
    assert drain(two) == [b"2"]


def test_a_restart_publishes_no_will_and_repeats_retained_messages() -> None:
    """A broker that dies cannot speak for anyone; a repeated subscription brings what is retained again."""
    broker = MemoryBroker()
    one = broker.connect("one", will=Will("gone", b"one"))
    two = broker.connect("two")
    two.subscribe("#")
    one.publish("kept", b"1", retain=True)
    assert drain(two) == [b"1"]
    broker.restart()
    assert drain(two) == [b"1"]


def test_a_second_connection_takes_over_the_client_id() -> None:
    """The older connection ends for good and its will is published."""
    broker = MemoryBroker()
    watcher = broker.connect("watcher")
    watcher.subscribe("status")
    first = broker.connect("one", will=Will("status", b"offline"))
    second = broker.connect("one")
    assert (first.connected, second.connected) == (False, True)
    assert drain(watcher) == [b"offline"]
    with pytest.raises(BrokerError, match="took over the client id 'one'"):
        first.publish("a", b"")
    first.resume()
    assert second.connected
    assert not first.connected


def test_what_is_held_for_want_of_a_link_is_not_flushed() -> None:
    """`flush` tells what is still on this side."""
    broker = MemoryBroker()
    one = broker.connect("one")
    one.drop()
    one.publish("a", b"")
    assert not one.flush(0)
    one.resume()
    assert one.flush(0)


def test_a_broker_keeps_its_retained_messages_for_inspection() -> None:
    """The last retained payload of each topic can be looked at."""
    broker = MemoryBroker()
    one = broker.connect("one")
    one.publish("a", b"1", retain=True)
    one.publish("b", b"2", retain=True)
    one.publish("a", b"", retain=True)
    assert broker.retained == {"b": b"2"}
