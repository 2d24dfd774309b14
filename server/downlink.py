"""What the fleet reads: versions cut into bands, published while somebody reads them, and cleared afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from edge_runtime.config import Wire
from edge_runtime.errors import CorruptPayloadError, TooLargeError
from edge_runtime.lora.adapter import Adapter, remembering
from edge_runtime.lora.factors import Factors
from edge_runtime.wire import bands, blobs, codec, topics
from edge_runtime.wire.messages import Band
from edge_runtime.wire.transport import Transport
from server.scratch import Scratch
from server.store import Store, StoredVersion

DECODED_VERSIONS = 4
"""Versions that are kept decoded: updates of a buffer are of several, and come in any order."""
CLEARED_AGAIN = 3
"""So many versions that were cleared before are cleared once more each time; see `Downlink.clear`."""


class Downlink:
    """The broadcast blobs of one fleet.

    Args:
        fleet: its name.
        wire: how versions are cut and packed.
        transport: connected.
        store: opened.
    """

    def __init__(self, fleet: str, wire: Wire, transport: Transport, store: Store) -> None:
        self._fleet, self._wire, self._transport, self._store = fleet, wire, transport, store
        self._decoded: dict[int, Adapter] = {}

    def cut(
        self, number: int, state: bytes, adapter: Adapter, factors: Sequence[Factors] = ("ab",)
    ) -> tuple[StoredVersion, list[bytes]]:
        """A version's bands and their payloads.

        Args:
            number: of the version.
            state: from which it goes on.
            adapter: that devices read.
            factors: what each range becomes a band of: of both, or of one and of the other.
        """
        ranges = bands.edges_for(max(adapter.ranks.values()), self._wire.band_edges)
        found, payloads = [], []
        for (start, stop), factor in itertools.product(ranges, factors):
            payload = codec.encode(bands.band(adapter, start, stop), self._wire.codec_down, factor=factor)
            ref = blobs.describe(payload, self._wire.chunk_bytes)
            found.append(Band(start=start, stop=stop, blob=ref, factor=factor))
            payloads.append(payload)
        return StoredVersion(number, state, tuple(found)), payloads

    def received(self, version: int) -> Adapter:
        """A version exactly as devices decoded it.

        Raises:
            CorruptPayloadError: it has retired.
            DiskFullError: it is large, and there is no room to lay it down.
        """
        found = self._decoded.pop(version, None)
        if found is None:
            stored = self._store.version(version)
            cut = stored.bands if stored else ()
            payloads = [self._store.blob(band.blob.sha256) for band in cut]
            if not cut or any(payload is None for payload in payloads):
                raise CorruptPayloadError(f"version {version} has retired; train from the current one")
            room = Scratch(self._store.path.parent)
            known = zip(cut, payloads, strict=True)
            decoded = ((band, room.put(codec.decode(payload))) for band, payload in known if payload is not None)
            found = remembering(bands.assembled(decoded))
        while len(self._decoded) >= DECODED_VERSIONS:
            del self._decoded[next(iter(self._decoded))]  # the one that was asked for the longest time ago
        self._decoded[version] = found
        return found

    def broadcast(self, version: StoredVersion) -> tuple[Band, ...]:
        """Publish the bands of a version, in chunks that the broker takes; returns how they are cut now."""
        size = max(band.blob.chunk_bytes for band in version.bands)
        if size > self._transport.largest:
            version = version.cut(blobs.smaller(size, self._transport.largest))
            self._store.recut(version)
        try:
            for band in version.bands:
                payload = self._store.blob(band.blob.sha256)
                for index, chunk in enumerate(blobs.split(payload or b"", band.blob.chunk_bytes)):
                    self._transport.publish(topics.broadcast(self._fleet, band.blob.sha256, index), chunk, retain=True)
        except TooLargeError:
            return self.broadcast(version)  # it turned out while we published
        return version.bands

    def repeat(self, versions: Iterable[int]) -> None:
        """Publish once more the bands of those of these versions that have not retired."""
        for number in versions:
            version = self._store.version(number)
            if version is not None and all(self._store.blob(band.blob.sha256) is not None for band in version.bands):
                self.broadcast(version)

    def clear(self, last: int) -> None:
        """Take versions up to this one, which nobody reads any more, from the broker, and then from the store.

        A crash in between, or a broker that goes back to an older memory, is why the newest of them are cleared again
        with each merge, each start and each new session.
        """
        for ref in self._store.outdated(last, since=last - CLEARED_AGAIN):
            for chunk in range(ref.chunks):
                self._transport.publish(topics.broadcast(self._fleet, ref.sha256, chunk), b"", retain=True)
        if self._transport.flush(5.0):
            self._store.retire(last)
