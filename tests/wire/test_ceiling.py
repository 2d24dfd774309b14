"""Finding out how large a message a broker takes: in theory, and against real brokers with small limits."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from random import Random
from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import TooLargeError
from edge_runtime.wire.broker import Settings
from edge_runtime.wire.bucket import Rates
from edge_runtime.wire.ceiling import LEAST, STRIKES, Ceiling, acknowledged, lost
from edge_runtime.wire.mqtt import LARGEST_PAYLOAD, connect
from tests.strategies import laws
from tests.wire.conftest import Clients, StartBroker

TOP = 8 << 20


@laws
@given(st.integers(LEAST, TOP), st.lists(st.integers(0, TOP), min_size=1, max_size=40))
def test_every_broker_gets_all_that_it_takes_after_a_few_losses(limit, sizes) -> None:
    """A broker that acknowledges in order what it takes, and hangs up on the rest."""
    ceiling, window = Ceiling(TOP), deque(sizes)
    for _ in range(200):
        while window and window[0] <= limit:
            ceiling = acknowledged(ceiling, window.popleft())
        if not window:
            break
        ceiling = lost(ceiling, window)
        window = deque(size for size in window if size <= ceiling.largest)
    assert not window
    assert ceiling.largest >= min(limit, TOP) // 2
    assert all(size <= ceiling.largest for size in sizes if size <= limit // 2)


@laws
@given(st.lists(st.tuples(st.booleans(), st.integers(0, TOP)), max_size=60))
def test_a_broker_that_acknowledges_something_in_between_is_never_blamed(events) -> None:
    ceiling = Ceiling(TOP)
    for taken, size in events:
        ceiling = acknowledged(ceiling, 1) if taken else lost(acknowledged(ceiling, 1), [size])
    assert ceiling.largest == TOP


def test_small_messages_and_those_that_once_passed_are_never_blamed() -> None:
    ceiling = acknowledged(Ceiling(TOP), 50_000)
    for _ in range(10 * STRIKES):
        ceiling = lost(ceiling, [50_000, 100])
    assert ceiling.largest == TOP


@pytest.mark.broker
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mosquitto", Settings(other_lines=["max_packet_size 50000"])),
        ("nats", Settings(max_payload=50_000)),
    ],
)
def test_a_real_broker_with_a_small_limit_is_found_out_and_the_rest_goes_through(
    kind: str, settings: Settings, start_broker: StartBroker
) -> None:
    events: list[str] = []
    broker = start_broker(kind, settings=settings)
    one = connect(broker.address, "one", on_event=events.append, random=Random(0), patience=20)
    two = connect(broker.address, "two", on_event=events.append, random=Random(1), patience=20)
    try:
        two.subscribe("t/+")
        one.publish("t/small", b"before")
        for number in range(4):
            one.publish(f"t/{number}", os.urandom(120 * 1024))
        one.publish("t/small", b"after")
        assert one.flush(120), events
        assert 4096 <= one.largest <= 61_440 < LARGEST_PAYLOAD
        assert any("chunk_bytes" in event for event in events)
        with pytest.raises(TooLargeError, match="hangs up on larger ones"):
            one.publish("t/0", bytes(120 * 1024))
        one.publish("t/fits", bytes(one.largest // 2))
        assert one.flush(60), events
        arrived = []
        while (delivery := two.receive(5)) is not None:
            delivery.ack()
            arrived.append((delivery.topic, len(delivery.payload)))
        assert [topic for topic, _ in dict.fromkeys(arrived)][-1] == "t/fits"
        assert {("t/small", 6), ("t/small", 5)} <= set(arrived)
    finally:
        one.close()
        two.close()


@pytest.mark.broker
def test_a_device_keeps_to_its_rates_in_both_directions(any_broker, to_broker: Callable[..., Clients]) -> None:
    """Measured over what takes long enough; below is what matters, above only shows that it moves at all."""
    rate, size = 400_000, 40_000
    slow = connect(
        any_broker.address, "slow", on_event=lambda _: None, random=Random(0), patience=20, rates=Rates(rate, rate)
    )
    fast = to_broker(any_broker).connect("fast")
    try:
        fast.subscribe("up/+")
        slow.subscribe("down/+")
        began = monotonic()
        for number in range(30):
            slow.publish(f"up/{number}", os.urandom(size))
        assert slow.flush(30)
        assert monotonic() - began > 30 * size / rate - 1.2, "a burst of a second is free"
        began = monotonic()
        for number in range(30):
            fast.publish(f"down/{number}", os.urandom(size))
        for _ in range(30):
            delivery = slow.receive(20)
            assert delivery is not None
            delivery.ack()
        assert monotonic() - began > 30 * size / rate - 1.2
    finally:
        slow.close()
