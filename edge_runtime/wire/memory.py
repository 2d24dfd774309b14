"""A broker and its transports in memory: the twin of MQTT for simulations and tests.

It keeps what a good broker keeps (retained messages, sessions by client id, unacknowledged deliveries, last wills) and
fails on request: `drop` and `resume` a link, `restart` the broker with or without its memory. There is no clock and no
chance in it: the same calls give the same deliveries in the same order.

Two differences from a network: what is published on a live link is acknowledged at once, so `publish` never blocks; and
a client whose patterns overlap receives a message once, where some brokers send it once per pattern.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from threading import Condition

from edge_runtime.errors import BrokerError, TooLargeError
from edge_runtime.wire.transport import Delivery, Will, check_pattern, check_topic, matches


@dataclass(frozen=True)
class _Message:
    topic: str
    payload: bytes
    retained: bool


@dataclass(eq=False)
class _Session:
    """What the broker owes one client id, connected or not."""

    waiting: deque[_Message] = field(default_factory=deque)
    unacknowledged: dict[int, _Message] = field(default_factory=dict)

    def rewind(self) -> None:
        """Put back in front what was delivered and not acknowledged: it is delivered again, in its old order."""
        self.waiting.extendleft(reversed(self.unacknowledged.values()))
        self.unacknowledged.clear()


class _Exchange:
    """The broker's memory and routing. Whoever calls a method holds `changed`."""

    def __init__(self) -> None:
        self.changed = Condition()
        self.retained: dict[str, bytes] = {}
        self.sessions: dict[str, _Session] = {}
        # Pattern → client ids, in order of subscription. Patterns without wildcards are looked up instead of tried one
        # by one, so that routing in a large fleet costs its few wildcards and not its many devices.
        self.exact: dict[str, dict[str, None]] = {}
        self.wild: dict[str, dict[str, None]] = {}
        self.deliveries = 0

    def forget(self) -> None:
        self.retained.clear()
        self.sessions.clear()
        self.exact.clear()
        self.wild.clear()

    def session(self, client_id: str) -> _Session:
        return self.sessions.setdefault(client_id, _Session())

    def route(self, topic: str, payload: bytes, *, retain: bool) -> None:
        if retain and payload:
            self.retained[topic] = payload
        elif retain:
            self.retained.pop(topic, None)
        receivers = dict(self.exact.get(topic, {}))
        for pattern, clients in self.wild.items():
            if matches(pattern, topic):
                receivers.update(clients)
        message = _Message(topic, payload, retained=False)
        for client_id in receivers:
            self.session(client_id).waiting.append(message)
        self.changed.notify_all()

    def subscribe(self, client_id: str, pattern: str) -> None:
        self._index(pattern).setdefault(pattern, {})[client_id] = None
        kept = [
            _Message(topic, load, retained=True) for topic, load in self.retained.items() if matches(pattern, topic)
        ]
        self.session(client_id).waiting.extend(kept)
        self.changed.notify_all()

    def unsubscribe(self, client_id: str, pattern: str) -> None:
        clients = self._index(pattern).get(pattern, {})
        clients.pop(client_id, None)
        if not clients:
            self._index(pattern).pop(pattern, None)

    def take(self, client_id: str) -> Delivery | None:
        session = self.session(client_id)
        if not session.waiting:
            return None
        message = session.waiting.popleft()
        self.deliveries += 1
        number = self.deliveries
        session.unacknowledged[number] = message

        def ack() -> None:
            with self.changed:
                # No number is used twice, so a late or second acknowledgement finds nothing to remove.
                session.unacknowledged.pop(number, None)

        return Delivery(message.topic, message.payload, message.retained, ack)

    def _index(self, pattern: str) -> dict[str, dict[str, None]]:
        return self.wild if "+" in pattern or "#" in pattern else self.exact


class MemoryBroker:
    """Retained messages, sessions and wills, shared by the transports that `connect` returns; thread-safe."""

    def __init__(self) -> None:
        self._exchange = _Exchange()
        self._transports: dict[str, MemoryTransport] = {}

    def connect(self, client_id: str, *, will: Will | None = None) -> MemoryTransport:
        """A new connection for `client_id`; an older one is dropped for good, as under MQTT."""
        with self._exchange.changed:
            older = self._transports.get(client_id)
            if older is not None:
                older.drop()
                older.retire(f"another connection took over the client id '{client_id}'")
            transport = MemoryTransport(self._exchange, client_id, will)
            self._transports[client_id] = transport
            transport.resume()
            return transport

    def restart(self, *, forget: bool = False) -> None:
        """Stop and start: every live link is made anew and no will is published; `forget` loses all that was kept."""
        with self._exchange.changed:
            linked = [transport for transport in self._transports.values() if transport.connected]
            for transport in linked:
                transport.drop(with_will=False)
            if forget:
                self._exchange.forget()
            for transport in linked:
                transport.resume()

    @property
    def retained(self) -> dict[str, bytes]:
        """A copy of what is kept for late subscribers, by topic."""
        with self._exchange.changed:
            return dict(self._exchange.retained)


class MemoryTransport:
    """One client of a `MemoryBroker`; made by its `connect`. What each method promises is said by `Transport`.

    `largest` may be set, as if the broker had turned out to take no more.
    """

    def __init__(self, exchange: _Exchange, client_id: str, will: Will | None) -> None:
        self.client_id = client_id
        self.will = will
        self.largest = 1 << 40
        self._exchange = exchange
        self._changed = exchange.changed
        self._patterns: dict[str, None] = {}
        self._abandoned: dict[str, None] = {}
        self._outbox: deque[tuple[str, bytes, bool]] = deque()
        self._connected = False
        self._over: str | None = None
        self._sessions = 0
        self._sent = 0
        self._received = 0

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Route a message now, or hold it until the link is back."""
        check_topic(topic)
        if len(payload) > self.largest:
            raise TooLargeError(f"a message holds up to {self.largest} bytes; found {len(payload)}; split it")
        with self._changed:
            self._check_alive()
            self._sent += len(topic.encode()) + len(payload)
            if self._connected:
                self._exchange.route(topic, payload, retain=retain)
            else:
                self._outbox.append((topic, payload, retain))

    def flush(self, timeout: float) -> bool:
        """Whether nothing is held back for want of a link, now or within `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._outbox or self._over is not None, timeout)
            return not self._outbox

    def subscribe(self, pattern: str) -> None:
        """Subscribe now, or as soon as the link is back."""
        check_pattern(pattern)
        with self._changed:
            self._check_alive()
            self._patterns[pattern] = None
            self._abandoned.pop(pattern, None)
            if self._connected:
                self._exchange.subscribe(self.client_id, pattern)

    def unsubscribe(self, pattern: str) -> None:
        """Take a subscription back now, or when the link is back; until then the broker collects for it."""
        with self._changed:
            self._check_alive()
            self._patterns.pop(pattern, None)
            if self._connected:
                self._exchange.unsubscribe(self.client_id, pattern)
            else:
                self._abandoned[pattern] = None

    def receive(self, timeout: float) -> Delivery | None:
        """The next delivery; `timeout=0` never waits, which is what a simulation wants."""
        with self._changed:
            self._changed.wait_for(self._something_to_take, timeout)
            self._check_alive()
            delivery = self._exchange.take(self.client_id) if self._connected else None
            if delivery is not None:
                self._received += len(delivery.topic.encode()) + len(delivery.payload)
            return delivery

    def close(self) -> None:
        """Leave without a last will; the session stays for the next connection of the same client id."""
        self.drop(with_will=False)
        self.retire("the transport is closed")

    def drop(self, *, with_will: bool = True) -> None:
        """Cut the link as a lost network does, and publish the will; without a link nothing happens."""
        with self._changed:
            if not self._connected:
                return
            self._connected = False
            if with_will and self.will is not None:
                self._exchange.route(self.will.topic, self.will.payload, retain=self.will.retain)

    def resume(self) -> None:
        """Make the link anew: what was unacknowledged comes again, patterns are repeated, what was held is sent."""
        with self._changed:
            if self._connected or self._over is not None:
                return
            self._exchange.session(self.client_id).rewind()
            self._connected = True
            self._sessions += 1
            for pattern in self._abandoned:
                self._exchange.unsubscribe(self.client_id, pattern)
            self._abandoned.clear()
            for pattern in self._patterns:
                self._exchange.subscribe(self.client_id, pattern)
            while self._outbox:
                topic, payload, retain = self._outbox.popleft()
                self._exchange.route(topic, payload, retain=retain)
            self._changed.notify_all()

    def retire(self, reason: str) -> None:
        """End this transport for good: from now on its methods raise BrokerError with `reason`."""
        with self._changed:
            self._over = self._over or reason
            self._changed.notify_all()

    @property
    def connected(self) -> bool:
        """Whether the link is up."""
        return self._connected

    @property
    def sessions(self) -> int:
        """How many times the link came up."""
        return self._sessions

    @property
    def bytes_sent(self) -> int:
        """Bytes of topics and payloads published."""
        return self._sent

    @property
    def bytes_received(self) -> int:
        """Bytes of topics and payloads delivered."""
        return self._received

    def _something_to_take(self) -> bool:
        waiting = self._connected and bool(self._exchange.session(self.client_id).waiting)
        return waiting or self._over is not None

    def _check_alive(self) -> None:
        if self._over is not None:
            raise BrokerError(self._over)
