"""Room for uploads under way: what the store has of each, within a bound for all of them together.

An upload is admitted with all the bytes that it will take, so whoever is admitted can be completed. One that has not
moved for a while keeps its room until somebody else needs it; then its chunks go, and its device, which still has the
update, begins again. The bound of a single upload is `Policy.max_upload_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_runtime.wire.messages import Offer, Rejected
from server.store import Store

DAMAGED_TIMES = 2
"""How often an upload that arrived damaged is asked for again."""


class Staging:
    """The uploads under way in a store.

    Args:
        store: opened.
        clock: seconds, monotonic.
        most: bytes of all uploads together.
        timeout: seconds without a new chunk after which an upload gives way.
    """

    def __init__(self, store: Store, clock: Callable[[], float], *, most: int, timeout: float) -> None:
        self._store, self._clock, self._most, self._timeout = store, clock, most, timeout
        # Another process counts its seconds from another origin: what a former one left has its full time again.
        self._moved = dict.fromkeys(store.staged(), clock())
        self._damaged: dict[str, tuple[str, int]] = {}

    def begin(self, offer: Offer) -> set[int] | Rejected:
        """The chunks of an offer that are here, or why it cannot be taken now.

        Raises:
            DiskFullError: no room to note it.
        """
        known = self._store.offer_of(offer.client)
        grown = offer.blob.size - (known.blob.size if known else 0)
        if grown > 0 and self._store.staged_bytes() + grown > self._most:
            refusal = self._make_room(offer)
            if refusal is not None:
                return refusal
        have = self._store.offered(offer)
        if known is None:
            self._moved[offer.client] = self._clock()
        return have

    def _make_room(self, offer: Offer) -> Rejected | None:
        """Let uploads give way that have not moved for too long; why that is not enough, or None."""
        taken = self._store.staged()
        taken.pop(offer.client, None)
        for client in self._idle(taken):
            if sum(taken.values()) + offer.blob.size <= self._most:
                break
            self._give_up(client)
            del taken[client]
        if sum(taken.values()) + offer.blob.size <= self._most:
            return None
        return Rejected(
            code="quota",
            reason=f"{len(taken)} uploads are under way and take {sum(taken.values())} of {self._most} bytes; this "
            f"one of {offer.blob.size} must wait; [server] max_staged_bytes gives more room",
            sha256=offer.blob.sha256,
        )

    def add(self, offer: Offer, index: int, payload: bytes) -> tuple[bool, set[int]]:
        """Store a chunk; whether it is new, and the chunks that are here.

        Raises:
            DiskFullError: no room for it.
        """
        before = self._store.have(offer)
        if index in before:
            return False, before
        have = self._store.add_chunk(offer, index, payload)
        self._moved[offer.client] = self._clock()
        return True, have

    def damaged(self, offer: Offer) -> bool:
        """All chunks are here, and are not the blob that was offered: forget them; whether to ask for them again.

        Nobody knows which of them it was. What is damaged every time is no accident of the way.

        Raises:
            DiskFullError: no room to note it.
        """
        blob, times = self._damaged.get(offer.client, ("", 0))
        times = times + 1 if blob == offer.blob.sha256 else 1
        self._damaged[offer.client] = offer.blob.sha256, times
        if times > DAMAGED_TIMES:
            return False
        self._store.drop_upload(offer)
        self._store.offered(offer)
        return True

    def _idle(self, clients: dict[str, int]) -> list[str]:
        """Those that have not moved for too long, the longest first."""
        now = self._clock()
        since = {client: self._moved.get(client, now) for client in clients}
        return sorted((client for client in clients if now - since[client] > self._timeout), key=since.__getitem__)

    def _give_up(self, client: str) -> None:
        offer = self._store.offer_of(client)
        self._moved.pop(client, None)
        if offer is not None:
            self._store.drop_upload(offer)
