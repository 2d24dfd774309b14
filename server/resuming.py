"""Uploads that are resumed: a device that repeats its offer is asked for the rest when its chunks have stopped coming.

An offer may overtake chunks: what a broker still has on its way, or a device's own MQTT client sends again after a lost
connection, would be asked for, and come twice.
"""

from __future__ import annotations

from collections.abc import Callable

QUIET_SECONDS = 1.0
"""How long an upload must have been still before its device is asked for the rest of it."""


class Resuming:
    """The devices that wait to be asked.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._moved: dict[str, float] = {}

    def offered(self, client: str) -> None:
        """It said an offer again that is known."""
        self._moved[client] = self._clock()

    def moved(self, client: str) -> None:
        """A chunk of it arrived."""
        if client in self._moved:
            self._moved[client] = self._clock()

    def settled(self, client: str) -> None:
        """Its upload is whole, or another one has begun."""
        self._moved.pop(client, None)

    def due(self) -> list[str]:
        """The devices that are to be asked now; each is returned once."""
        now = self._clock()
        found = [client for client, since in self._moved.items() if now - since >= QUIET_SECONDS]
        for client in found:
            del self._moved[client]
        return found
