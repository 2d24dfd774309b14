"""A server whose disk is full: it refuses what it cannot store, keeps what it has, and goes on when there is room.

Nobody is given up meanwhile, for it is not the devices that do not move. Whatever a device says again by itself (hello,
offer, chunks) is refused for now and acknowledged, so that the broker's window does not fill with it. What nobody says
again (a report, a presence) is held back unacknowledged, and taken when there is room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from edge_runtime.errors import DiskFullError
from edge_runtime.wire import topics
from edge_runtime.wire.messages import Offer, Rejected, Report
from edge_runtime.wire.transport import Delivery
from server import events

RETRY_SECONDS = 10.0
"""Between two looks whether there is room again."""

HELD = 32
"""Deliveries held back, at most: fewer than a broker lets be unacknowledged, or it would send nothing any more."""


class Shortage:
    """Whether there is no room, since when, and what waits for it.

    Args:
        clock: seconds, monotonic.
        say: told when it begins and when it ends.
    """

    def __init__(self, clock: Callable[[], float], say: Callable[[str], None]) -> None:
        self._clock, self._say = clock, say
        self._looked: float | None = None
        self._held: deque[Delivery] = deque(maxlen=HELD)
        self._told: set[str] = set()

    @property
    def lasts(self) -> bool:
        """Whether the last write did not fit."""
        return self._looked is not None

    @property
    def due(self) -> bool:
        """Whether it is time to look for room again."""
        return self._looked is not None and self._clock() - self._looked >= RETRY_SECONDS

    def found(self, error: DiskFullError) -> None:
        """A write did not fit."""
        if not self.lasts:
            self._say(f"{error}; what is stored is kept, devices are told to come again, and this server goes on")
        self._looked = self._clock()

    def ended(self) -> list[Delivery]:
        """There is room again; what was held back."""
        self._looked = None
        self._told.clear()
        self._say("there is room on the disk again")
        held = list(self._held)
        self._held.clear()
        return held

    def looked(self) -> None:
        """There still is none; whoever comes is told once more."""
        self._looked = self._clock()
        self._told.clear()

    def hold(self, delivery: Delivery) -> None:
        """Take it when there is room."""
        self._held.append(delivery)

    def refusal(self, client: str, sha256: str) -> Rejected | None:
        """What to tell a device, once between two looks."""
        if client in self._told:
            return None
        self._told.add(client)
        return Rejected(
            code="no-space",
            reason="the server's disk is full; it keeps what it has, and takes yours when there is room",
            sha256=sha256,
        )


def said_once(event: events.Event | None) -> bool:
    """Whether nobody says it again: a report, or a presence."""
    return isinstance(event, events.PresenceChanged) or (
        isinstance(event, events.Heard) and isinstance(event.message, Report)
    )


def blob_of(topic: topics.Topic, event: events.Event | None) -> str:
    """The blob that a delivery was about, or ''."""
    if isinstance(event, events.Heard) and isinstance(event.message, Offer):
        return event.message.blob.sha256
    return topic.digest if topic.kind == "upload" else ""
