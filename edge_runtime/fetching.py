"""The bands of a version on their way to this device: asked for, put together, verified, kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edge_runtime.errors import WireError
from edge_runtime.state import DeviceState
from edge_runtime.wire import blobs, topics
from edge_runtime.wire.blobs import BlobRef
from edge_runtime.wire.transport import Transport

STILL_SECONDS = 60.0
"""How long bands may stand still before they are asked for again, at first: a chunk at 2 kB/s."""


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
        self._moved, self._patience = clock(), STILL_SECONDS

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
        self._moved, self._patience = self._clock(), STILL_SECONDS
        self._ask()

    def take(self, sha256: str, index: int, payload: bytes) -> bool:
        """Take a chunk; whether it is one that was missing, or may have been.

        Raises:
            CorruptPayloadError: it was the last one of its blob, and together they are another; all come again.
        """
        chunks, ref = self._chunks.get(sha256), self._refs.get(sha256)
        if chunks is None or ref is None or not blobs.fits(ref, index, payload):
            return False
        self._moved = self._clock()
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

    def ask_again(self) -> None:
        """Ask again for what has stood still for long: a broker may have learnt only now what it retains.

        Each time more patiently: all chunks come again, and on a slow link that holds up those on their way.
        """
        if self._chunks and self._clock() - self._moved >= self._patience:
            self._moved, self._patience = self._clock(), 2 * self._patience
            self._ask()

    def _ask(self) -> None:
        for sha in self._chunks:
            self._transport.subscribe(topics.broadcast(self._fleet, sha))
