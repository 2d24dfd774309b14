"""A broker that does all that brokers do wrong, over the good one in memory.

Always: messages overtake each other, come twice, and come late; retained messages are delivered twice. When it
restarts: it forgets sessions with their subscriptions, drops what it had queued, loses retained messages, or goes back
to an older memory of them, as one does that is killed between two snapshots. Even while it runs it loses retained
messages, silently. It has no virtue but one: what it loses, it does not invent.
"""

from __future__ import annotations

from collections import deque
from random import Random
from typing import Any, cast

from edge_runtime.wire.memory import MemoryBroker, MemoryTransport
from edge_runtime.wire.transport import Delivery, Will

POOL = 6
"""How many messages may overtake each other."""
RECENT = 20
"""Of so many former deliveries, some come again."""


class BadBroker:
    """See the module. Takes the place of a `MemoryBroker`.

    Args:
        seed: draws its vices.
    """

    def __init__(self, seed: int) -> None:
        self.draw = Random(seed)
        self.vices: dict[str, int] = {}
        self._good = MemoryBroker()
        self._snapshot: dict[str, bytes] = {}

    def connect(self, client_id: str, *, will: Will | None = None) -> MemoryTransport:
        """As `MemoryBroker.connect`, but the transport is bad."""
        transport = self._good.connect(client_id, will=will)
        return cast("MemoryTransport", _BadTransport(transport, self.draw))

    @property
    def retained(self) -> dict[str, bytes]:
        """What it has not lost yet."""
        return self._good.retained

    def look_away(self) -> None:
        """A moment in which it may remember or lose something without anybody being told."""
        exchange = self._good._exchange
        with exchange.changed:
            if self.draw.random() < 0.1:
                self._snapshot = dict(exchange.retained)
            if exchange.retained and self.draw.random() < 0.02:
                exchange.retained.pop(self.draw.choice(list(exchange.retained)))
                self._note("lost a retained message silently")

    def restart(self, *, forget: bool = False) -> None:
        """Stop and start with one of its vices, or with all for `forget`."""
        exchange = self._good._exchange
        vice = self.draw.choice(("sessions", "queues", "retained", "snapshot", "everything"))
        with exchange.changed:
            self._note(f"restarted, {'everything' if forget else vice}")
            if vice == "queues":
                for session in exchange.sessions.values():
                    session.waiting.clear()
                    session.unacknowledged.clear()
            elif vice == "sessions":
                exchange.sessions.clear()
                exchange.exact.clear()
                exchange.wild.clear()
            elif vice == "retained":
                for topic in [topic for topic in exchange.retained if self.draw.random() < 0.5]:
                    del exchange.retained[topic]
            elif vice == "snapshot":
                exchange.retained = dict(self._snapshot)
            self._good.restart(forget=forget or vice == "everything")

    def _note(self, vice: str) -> None:
        self.vices[vice] = self.vices.get(vice, 0) + 1


class _BadTransport:
    """Delivers what its good twin does, but out of order, late and again."""

    def __init__(self, transport: MemoryTransport, draw: Random) -> None:
        self._transport, self._draw = transport, draw
        self._pool: list[Delivery] = []
        self._recent: deque[Delivery] = deque(maxlen=RECENT)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def receive(self, timeout: float) -> Delivery | None:
        """Some delivery of those that are there, or of those that were."""
        if self._recent and self._draw.random() < 0.05:
            return self._draw.choice(self._recent)
        while len(self._pool) < POOL and (delivery := self._transport.receive(timeout)) is not None:
            # A retained message comes twice.
            self._pool += [delivery] * (1 + delivery.retained)
        if not self._pool or self._draw.random() < 0.1:
            return None
        delivery = self._pool.pop(self._draw.randrange(len(self._pool)))
        self._recent.append(delivery)
        return delivery
