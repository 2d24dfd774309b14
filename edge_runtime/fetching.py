"""The bands of a version on their way to this device: asked for, put together, verified, kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edge_runtime.errors import WireError
from edge_runtime.state import DeviceState
from edge_runtime.wire import blobs, topics
from edge_runtime.wire.blobs import BlobRef
from edge_runtime.wire.transport import Transport

STILL_SECONDS = 10.0
"""How long bands may stand still before they are looked for, at first."""


class Fetching:
    """What one device fetches.

    Args:
        fleet: its fleet's name.
        transport: connected.
        disk: keeps what is complete.
        clock: seconds, monotonic.
    """

    def __init__(self, fleet: str, transport: Transport, disk: DeviceState, clock: Callable[[], float]) -> None:
        self._fleet, self._transport, self._disk, self._clock = fleet, transport, disk, clock
        self._refs: Mapping[str, BlobRef] = {}
        self._chunks: dict[str, dict[int, bytes]] = {}
        self._moved, self._patience, self._called = clock(), STILL_SECONDS, False

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return not self._chunks

    def begin(self, refs: Mapping[str, BlobRef]) -> None:
        """Fetch these blobs, by SHA-256, and no others; those on disk are kept, and others forgotten."""
        for sha in set(self._chunks) - set(refs):
            self._transport.unsubscribe(topics.broadcast(self._fleet, sha))
        self._disk.keep_bands(refs.keys())
        self._refs, self._chunks = refs, {sha: {} for sha in refs if self._disk.band(sha) is None}
        self._moved, self._patience, self._called = self._clock(), STILL_SECONDS, False
        self._ask()

    def take(self, sha256: str, index: int, payload: bytes) -> bool:
        """Take a chunk; whether it is one that was missing, or may have been.

        Raises:
            CorruptPayloadError: it was the last one of its blob, and together they are another; all come again.
        """
        chunks, ref = self._chunks.get(sha256), self._refs.get(sha256)
        if chunks is None or ref is None or not blobs.fits(ref, index, payload):
            return False
        self._moved, self._called = self._clock(), False
        chunks[index] = payload
        if blobs.missing(ref, chunks):
            return True
        try:
            self._disk.put_band(sha256, blobs.join(ref, chunks))
        except WireError:
            chunks.clear()  # a broker mixed something up; its retained chunks come again with the next subscription
            self._transport.subscribe(topics.broadcast(self._fleet, sha256))
            raise
        del self._chunks[sha256]
        self._transport.unsubscribe(topics.broadcast(self._fleet, sha256))
        return True

    def look_again(self, call: Callable[[], None]) -> None:
        """Ask again for what stands still: a broker may have lost it, or learnt only now what it retains.

        All chunks come again then, which on a slow link holds up those on their way. But what a broker sends to one
        client keeps its order, so once a message sent after the last chunk is acknowledged, no chunk is on its way.
        Even so it is done ever more rarely: some brokers answer out of order what they must first look for.

        Args:
            call: sends some message to the broker.
        """
        if not self._chunks or self._clock() - self._moved < self._patience or not self._transport.flush(0.0):
            return
        if not self._called:
            self._called = True
            call()
            return
        self._moved, self._patience, self._called = self._clock(), 2 * self._patience, False
        self._ask()

    def _ask(self) -> None:
        for sha in self._chunks:
            self._transport.subscribe(topics.broadcast(self._fleet, sha))
