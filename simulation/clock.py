"""Virtual time: events wait in a heap, and the clock jumps from one to the next.

Events of one instant happen in the order in which they were scheduled, so a run is the same each time. Nothing is
scheduled in the past: no effect comes before its cause.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

Happening = Callable[[], None]


@dataclass(eq=False)
class Event:
    """Something that will happen, unless it is cancelled.

    Attributes:
        at: seconds of virtual time.
        happen: what happens.
        cancelled: it will not happen.
    """

    at: float
    happen: Happening
    cancelled: bool = field(default=False)

    def cancel(self) -> None:
        """See that it does not happen; after it has happened, nothing."""
        self.cancelled = True


class Clock:
    """Seconds since the simulation began, and what will happen."""

    def __init__(self) -> None:
        self._now = 0.0
        self._heap: list[tuple[float, int, Event]] = []
        self._scheduled = 0
        self.happened = 0
        """Events so far."""

    def __call__(self) -> float:
        """The time, as a server or a governor asks for it."""
        return self._now

    @property
    def now(self) -> float:
        """The time, in seconds."""
        return self._now

    def pending(self, *but: Event | None) -> bool:
        """Whether anything will happen, apart from these."""
        return any(not event.cancelled and event not in but for _, _, event in self._heap)

    def after(self, seconds: float, happen: Happening) -> Event:
        """Let something happen in so many seconds.

        Raises:
            ValueError: before now, or at no time at all.
        """
        return self.at(self._now + seconds, happen)

    def at(self, when: float, happen: Happening) -> Event:
        """Let something happen at that time.

        Raises:
            ValueError: before now, or at no time at all.
        """
        if not self._now <= when < float("inf"):
            raise ValueError(f"an event comes at {self._now} s or later; found {when} s")
        event = Event(when, happen)
        heapq.heappush(self._heap, (when, self._scheduled, event))
        self._scheduled += 1
        return event

    def step(self) -> bool:
        """Let the next event happen; whether there was one."""
        self._drop_cancelled()
        if not self._heap:
            return False
        self._now, _, event = heapq.heappop(self._heap)
        event.cancelled = True
        self.happened += 1
        event.happen()
        return True

    def _drop_cancelled(self) -> None:
        while self._heap and self._heap[0][2].cancelled:
            heapq.heappop(self._heap)
