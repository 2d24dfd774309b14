"""The real transport: MQTT 3.1.1 through paho-mqtt, at least once, across lost links and killed brokers.

`link` keeps the connection; paho keeps what the broker has not acknowledged and sends it again; this module has the
messages. Flow control, out: `publish` blocks while the window of unacknowledged messages is full. In: every delivery is
acknowledged by whoever stored it, and a broker sends only so many unacknowledged ones (Mosquitto its
`max_inflight_messages`, NATS its `max_ack_pending`). So the queue of arrivals needs no bound of its own, and the
network thread never waits for a slow reader, which would also stop the keep-alive.

A device may bound its bytes a second (`bucket`): out, `publish` waits for its turn; in, the network thread stops
reading for moments, and TCP slows the broker. What a broker sends again after a lost link counts again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

from edge_runtime.errors import TooLargeError
from edge_runtime.wire.address import BrokerAddress
from edge_runtime.wire.bucket import Pace, Rates
from edge_runtime.wire.ceiling import STRIKES, Ceiling, acknowledged, lost
from edge_runtime.wire.link import Hooks, Link
from edge_runtime.wire.transport import Delivery, Transport, Will, check_pattern, check_topic

__all__ = ["BrokerAddress", "MqttTransport", "connect"]

WINDOW_MESSAGES = 64
# A few large messages fill the window as well as many small ones: it is held in memory until acknowledged.
WINDOW_BYTES = 16 * 2**20
# What the embedded brokers take. A broker hangs up on a larger message, which would then be sent again, for ever.
LARGEST_PAYLOAD = 8 * 2**20 - 2**16
KEEPALIVE_S = 30
TCP_TIMEOUT_S = 10.0
SUBACK_TIMEOUT_S = 10.0
RETRY_REFUSED_S = 10.0
# AWS IoT Core refuses a request with more patterns than this.
PATTERNS_AT_ONCE = 8


def connect(
    address: BrokerAddress,
    client_id: str,
    *,
    on_event: Callable[[str], None],
    random: Random,
    will: Will | None = None,
    patience: float | None = None,
    rates: Rates | None = None,
) -> Transport:
    """Connect, and stay connected until `close`; returns once the broker has accepted the first connection.

    A session outlives its process: a client that starts anew under its old id also receives what matches the
    subscriptions of its former life, and should acknowledge what it no longer knows.

    Args:
        address: the broker.
        client_id: fixed for the life of a device: the broker keeps its session under this name.
        on_event: told in a sentence what happens to the connection; called in the network thread, must not block.
        random: jitter of the back-off.
        will: published by the broker when the connection ends without `close`.
        patience: seconds after which to give up if there never was a connection; None tries for ever.
        rates: what may be moved a second.

    Raises:
        BrokerError: nothing within `patience`, or the broker refused us, which is not tried again.
        ConfigError: a TLS file is missing or malformed, or the client id is.
    """
    client = _client(address, address.client_id(client_id), will)
    transport = MqttTransport(client, address, on_event, random, rates or Rates())
    try:
        transport.start(patience)
    except BaseException:
        transport.close()
        raise
    return transport


def _client(address: BrokerAddress, client_id: str, will: Will | None) -> paho.Client:
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        clean_session=False,
        protocol=paho.MQTTv311,
        manual_ack=True,
        # Reconnecting is the link's; with True, paho would also fall back to MQTT 3.1 when 3.1.1 is refused.
        reconnect_on_failure=False,
    )
    client.connect_timeout = TCP_TIMEOUT_S
    client.max_inflight_messages_set(WINDOW_MESSAGES)
    if address.username is not None:
        client.username_pw_set(address.username, address.password)
    if address.encrypted:
        client.tls_set_context(address.tls_context())
    if will is not None:
        client.will_set(will.topic, will.payload, qos=1, retain=will.retain)
    # Only notes address and keep-alive; the link connects.
    client.connect_async(address.host, address.port, KEEPALIVE_S)
    return client


class MqttTransport:
    """One client of an MQTT broker; made by `connect`. What each method promises is said by `Transport`."""

    # `_changed`, the link's, guards all that follows it here.

    def __init__(
        self, client: paho.Client, address: BrokerAddress, on_event: Callable[[str], None], random: Random, rates: Rates
    ) -> None:
        self._client = client
        self._address = address
        self._say = on_event
        self._writing, self._reading = Pace(rates.up, time.monotonic), Pace(rates.down, time.monotonic)
        hooks = Hooks(on_event, self._lost, self._opened, self._ask_again)
        self._link = Link(client, address, hooks, random, self._reading)
        self._changed = self._link.changed
        self._sent = self._received = 0
        self._ceiling = Ceiling(LARGEST_PAYLOAD)
        # Payloads' sizes of the messages not yet acknowledged, and those among them that wait for a connection.
        self._window: deque[int] = deque()
        self._held: deque[tuple[str, bytes, bool]] = deque()
        self._inbox: deque[Delivery] = deque()
        # What is wanted, and what is not any more but may live on in the broker's session.
        self._patterns: dict[str, None] = {}
        self._abandoned: dict[str, None] = {}
        # What the broker said to it. `_asked` is guarded by the gate.
        self._asked: dict[int, list[str]] = {}
        self._granted: set[str] = set()
        self._refused: dict[str, float] = {}
        client.on_message = self._arrived
        client.on_publish = self._acknowledged
        client.on_subscribe = self._subscribed
        client.on_unsubscribe = self._unsubscribed

    def start(self, patience: float | None) -> None:
        """Begin connecting and wait for the first session; see `connect`."""
        self._link.start(patience)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Queue a message for sending, once the window has room for it.

        Raises:
            TooLargeError: brokers would hang up on a payload of this size.
        """
        check_topic(topic)
        size = len(topic.encode()) + len(payload)
        with self._changed:
            while self._fits(payload) and not self._link.over:
                turn = self._writing.wait
                if turn <= 0 and self._has_room(len(payload)):
                    break
                self._changed.wait(turn or None)
            self._link.check_alive()
            self._window.append(len(payload))
            self._writing.take(size)
            self._sent += size
            if not self._link.connected:
                self._held.append((topic, payload, retain))
                return
        with self._link.gate:
            self._send(topic, payload, retain)

    def flush(self, timeout: float) -> bool:
        """Whether the window is empty, now or within `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._window or self._link.over, timeout)
            return not self._window

    def subscribe(self, pattern: str) -> None:
        """Subscribe; a connected client waits for the broker to say so, and then misses nothing published later."""
        check_pattern(pattern)
        with self._changed:
            self._link.check_alive()
            self._patterns[pattern] = None
            self._abandoned.pop(pattern, None)
            self._granted.discard(pattern)
            self._refused.pop(pattern, None)
            if not self._link.connected:
                return
        with self._link.gate:
            self._ask([pattern])
        with self._changed:
            self._changed.wait_for(lambda: self._settled(pattern), SUBACK_TIMEOUT_S)

    def unsubscribe(self, pattern: str) -> None:
        """Take a subscription back; repeated after reconnects until the broker has confirmed it."""
        with self._changed:
            self._link.check_alive()
            self._patterns.pop(pattern, None)
            self._abandoned[pattern] = None
            self._refused.pop(pattern, None)
            if not self._link.connected:
                return
        with self._link.gate:
            self._take_back([pattern])

    def receive(self, timeout: float) -> Delivery | None:
        """The next delivery, if one comes in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._link.over, timeout)
            self._link.check_alive()
            return self._inbox.popleft() if self._inbox else None

    def close(self) -> None:
        """Disconnect in order; the broker keeps for the session what was not acknowledged to it."""
        self._link.close()

    @property
    def connected(self) -> bool:
        """Whether there is a connection right now."""
        return self._link.connected

    @property
    def sessions(self) -> int:
        """How many connections there have been."""
        return self._link.sessions

    @property
    def largest(self) -> int:
        """Bytes of the largest payload that the broker seems to take."""
        return self._ceiling.largest

    @property
    def bytes_sent(self) -> int:
        """Bytes of topics and payloads published."""
        return self._sent

    @property
    def bytes_received(self) -> int:
        """Bytes of topics and payloads delivered."""
        return self._received

    def _fits(self, payload: bytes) -> bool:
        """True.

        Raises:
            TooLargeError: it does not fit into a message.
        """
        largest = self._ceiling.largest
        if len(payload) <= largest:
            return True
        why = "" if largest == LARGEST_PAYLOAD else f", for the broker at {self._address} hangs up on larger ones"
        raise TooLargeError(f"a message holds up to {largest} bytes{why}; found {len(payload)}; split it")

    def _has_room(self, size: int) -> bool:
        window = self._window
        return not window or (len(window) < WINDOW_MESSAGES and sum(window) + size <= WINDOW_BYTES)

    def _settled(self, pattern: str) -> bool:
        answered = pattern in self._granted or pattern in self._refused
        return answered or not self._link.connected or self._link.over

    # With the gate held, in any thread.

    def _send(self, topic: str, payload: bytes, retain: bool) -> None:
        # Should the connection be lost by now, paho keeps the message and sends it after the next CONNACK. A message
        # number that is still in use, after 65,535 others, is refused before anything is kept: the next one will do.
        while self._client.publish(topic, payload, qos=1, retain=retain).rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            continue

    def _ask(self, patterns: list[str]) -> None:
        _, number = self._client.subscribe([(pattern, 1) for pattern in patterns])
        if number is not None:
            self._asked[number] = patterns

    def _take_back(self, patterns: list[str]) -> None:
        _, number = self._client.unsubscribe(patterns)
        if number is not None:
            self._asked[number] = patterns

    # Called by the link, in its thread.

    def _lost(self) -> None:
        """A connection ended. If a message was too large for the broker, take it back, or that would go on for ever."""
        with self._changed:
            before, self._ceiling = self._ceiling, lost(self._ceiling, self._window)
            largest, suspect = self._ceiling.largest, max(self._window, default=0)
        if largest == before.largest:
            return
        unacknowledged = self._client.drop_out_messages()
        kept = [message for message in unacknowledged if len(message.payload) <= largest]
        with self._changed:
            for message in unacknowledged:
                if len(message.payload) > largest:
                    self._window.remove(len(message.payload))
            self._held.extendleft((m.topic, bytes(m.payload), m.retain) for m in reversed(kept))
            self._changed.notify_all()
        self._say(
            f"broker at {self._address} hung up {STRIKES} times in a row before it took a message of {suspect} bytes; "
            f"sending at most {largest} bytes at once from now on. Its limit (Mosquitto's max_packet_size, NATS's "
            "max_payload, EMQX's mqtt.max_packet_size) should be above [wire] chunk_bytes"
        )

    def _opened(self) -> None:
        with self._changed:
            wanted, abandoned = list(self._patterns), list(self._abandoned)
            held, self._held = self._held, deque()
            self._granted.clear()
            self._refused.clear()
        self._asked.clear()
        # Also where the broker says that it knows our session: some keep the session and lose its subscriptions.
        for some in _batches(abandoned):
            self._take_back(some)
        for some in _batches(wanted):
            self._ask(some)
        for topic, payload, retain in held:
            self._send(topic, payload, retain)

    def _ask_again(self) -> None:
        with self._changed:
            due = [pattern for pattern, when in self._refused.items() if time.monotonic() >= when]
            for pattern in due:
                del self._refused[pattern]
        with self._link.gate:
            for some in _batches(due):
                self._ask(some)

    # Called by paho, in the link's thread.

    def _subscribed(self, _client: Any, _data: Any, number: int, reasons: list[ReasonCode], _properties: Any) -> None:
        with self._link.gate:  # whoever asked has noted the number by now
            answers = list(zip(self._asked.pop(number, []), reasons, strict=False))
        with self._changed:
            self._granted.update(pattern for pattern, reason in answers if not reason.is_failure)
            refused = [pattern for pattern, reason in answers if reason.is_failure and pattern in self._patterns]
            self._refused.update((pattern, time.monotonic() + RETRY_REFUSED_S) for pattern in refused)
            self._changed.notify_all()
        for pattern in refused:
            self._say(
                f"broker at {self._address} refused the subscription to '{pattern}'; check its access rules and "
                f"limits; asking again in {RETRY_REFUSED_S:g} s"
            )

    def _unsubscribed(self, _client: Any, _data: Any, number: int, _reasons: Any, _properties: Any) -> None:
        with self._link.gate:
            patterns = self._asked.pop(number, [])
        with self._changed:
            for pattern in patterns:
                self._abandoned.pop(pattern, None)

    def _arrived(self, client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        number, quality, session = message.mid, message.qos, self._link.sessions
        done = False

        def ack() -> None:
            nonlocal done
            # The number belongs to the session it came in; in a later one it may mean another message.
            if not self._link.connected:
                return
            with self._link.gate:
                if not done and session == self._link.sessions:
                    done = True
                    client.ack(number, quality)

        delivery = Delivery(message.topic, bytes(message.payload), message.retain, ack)
        with self._changed:
            self._inbox.append(delivery)
            size = len(delivery.topic.encode()) + len(delivery.payload)
            self._reading.take(size)
            self._received += size
            self._changed.notify_all()

    def _acknowledged(self, _client: Any, _data: Any, _number: int, _reason: Any, _properties: Any) -> None:
        with self._changed:
            # Brokers acknowledge in order [MQTT-4.6.0-2]; should one not, only the window's bytes are off for a while.
            self._ceiling = acknowledged(self._ceiling, self._window.popleft())
            self._changed.notify_all()


def _batches(patterns: list[str]) -> list[list[str]]:
    return [patterns[at : at + PATTERNS_AT_ONCE] for at in range(0, len(patterns), PATTERNS_AT_ONCE)]
