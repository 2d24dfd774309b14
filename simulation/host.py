"""The server in virtual time: `server.service` as it is, on the broker in memory, with the clock of the simulation.

Whatever devices say is published by one client of that broker, which stands for all of them, at the moment at which it
arrives; the server is done with it in no time. What the server publishes is handed on: bands are kept until they are
cleared, and Directives and answers go to whoever is to hear them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edge_runtime.config import Config
from edge_runtime.wire import topics
from edge_runtime.wire.memory import MemoryBroker, MemoryTransport
from edge_runtime.wire.messages import Directive, Message, load
from edge_runtime.wire.transport import Delivery
from server import rounds, standing
from server.service import Service
from server.state import State
from server.store import Store

RUN = "simulation"
"""The name of the fleet's life: a real server draws one."""
SERVER, DEVICES = "server", "devices"

Deliver = Callable[[str, Message, int], None]
"""Told of an answer to a device: its name, the message, its bytes."""


class Host:
    """One fleet's server.

    Args:
        config: the fleet's file.
        store: opened.
        clock: seconds of virtual time.
        poll: seconds between two ticks of the server.
        announce: told of every Directive, with its bytes.
        deliver: told of every answer.
        record: given what the server records.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        clock: Callable[[], float],
        *,
        poll: float,
        announce: Callable[[Directive, int], None],
        deliver: Deliver,
        record: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._config, self._store, self._clock, self._poll = config, store, clock, poll
        self._announce, self._deliver, self._record = announce, deliver, record
        self._fleet = config.fleet.name
        self._broker = MemoryBroker()
        self._devices = self._broker.connect(DEVICES)
        for pattern in (topics.directive(self._fleet), topics.down(self._fleet, "+"), topics.broadcasts(self._fleet)):
            self._devices.subscribe(pattern)
        self._chunks: dict[str, dict[int, bytes]] = {}
        self._bands: dict[str, bytes] = {}
        self.notes: list[str] = []
        """What the server told people since somebody looked."""
        if store.rounds() is None:
            state, _ = rounds.begin(RUN, config.fleet.base, clock())
            store.save_rounds(standing.dump(state))

    def begin(self) -> None:
        """Start the server."""
        self._transport = self._broker.connect(SERVER)
        self.service = Service(
            self._config, _Now(self._transport), self._store, say=self.notes.append, record=self._record,
            clock=self._clock,
        )  # fmt: skip
        self.service.begin()
        self._hand_on()

    @property
    def state(self) -> State:
        """Where the rounds stand."""
        return self.service.state

    def say(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Something from a device arrives."""
        self._devices.publish(topic, payload, retain=retain)
        self.turn()

    def turn(self) -> None:
        """Let the server do what it can do now."""
        while self.service.turn(self._poll):
            pass
        self._hand_on()

    def crash(self) -> None:
        """End the server as a power cut does, and start it again on what its store remembers."""
        self._transport.drop()
        self.begin()
        self.turn()

    def band(self, sha256: str) -> bytes | None:
        """A broadcast blob; None once it is cleared. All devices hold the same bytes, which are here once."""
        chunks = self._chunks.get(sha256)
        if chunks and sha256 not in self._bands:
            self._bands[sha256] = b"".join(chunks[index] for index in sorted(chunks))
        return self._bands.get(sha256)

    def _hand_on(self) -> None:
        while (delivery := self._devices.receive(0.0)) is not None:
            delivery.ack()
            topic = topics.parse(self._fleet, delivery.topic)
            if topic is None:
                continue
            if topic.kind == "blob":
                self._keep(topic.digest, topic.chunk, delivery.payload)
            elif topic.kind == "round":
                directive = load(delivery.payload)
                if isinstance(directive, Directive):
                    self._announce(directive, len(delivery.payload))
            else:
                self._deliver(topic.client, load(delivery.payload), len(delivery.payload))

    def _keep(self, sha256: str, index: int, payload: bytes) -> None:
        self._bands.pop(sha256, None)
        if payload:
            self._chunks.setdefault(sha256, {})[index] = payload
        else:
            self._chunks.pop(sha256, None)


class _Now:
    """A transport that waits for nothing: what is not there now comes later in virtual time."""

    def __init__(self, transport: MemoryTransport) -> None:
        self._transport = transport

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self._transport.publish(topic, payload, retain=retain)

    def flush(self, _timeout: float) -> bool:
        return self._transport.flush(0.0)

    def subscribe(self, pattern: str) -> None:
        self._transport.subscribe(pattern)

    def unsubscribe(self, pattern: str) -> None:
        self._transport.unsubscribe(pattern)

    def receive(self, _timeout: float) -> Delivery | None:
        return self._transport.receive(0.0)

    def close(self) -> None:
        self._transport.close()

    @property
    def connected(self) -> bool:
        return self._transport.connected

    @property
    def largest(self) -> int:
        return self._transport.largest

    @property
    def sessions(self) -> int:
        return self._transport.sessions

    @property
    def bytes_sent(self) -> int:
        return self._transport.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._transport.bytes_received
