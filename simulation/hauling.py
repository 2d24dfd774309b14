"""The bands and chunks of one device on their way: one transfer at a time, kept in whole chunks when it is stopped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from edge_runtime import local_round
from edge_runtime.wire import blobs, topics
from edge_runtime.wire.messages import Band, Directive, Offer
from simulation import links
from simulation.fleet import Planned
from simulation.links import Transfer
from simulation.memory import Disk
from simulation.stored import whole
from simulation.surroundings import Accounts, Person, Surroundings

Ranges = tuple[tuple[int, int], ...]


class Hauling:
    """What a device fetches and sends, from one start of its process to the next.

    Args:
        person: whose.
        around: what all devices share.
        disk: of the device: bands go there, updates come from there.
        accounts: of the device.
        fetched: told of a version that is here.
    """

    def __init__(
        self,
        person: Person,
        around: Surroundings,
        disk: Disk,
        accounts: Accounts,
        fetched: Callable[[int], None],
    ) -> None:
        self._person, self._around, self._disk, self._accounts = person, around, disk, accounts
        self._whole = fetched
        self._fetching: tuple[Directive, Planned] | None = None
        self._sending: tuple[Offer, Ranges, Planned] | None = None
        self._transfer: Transfer | None = None
        self._up, self._about, self._since = False, "", 0.0
        self._partial: dict[str, float] = {}

    @property
    def under_way(self) -> str:
        """What a device would report of it: fetching, offering, or nothing."""
        return "" if self._transfer is None else "offering" if self._up else "fetching"

    def fetch(self, directive: Directive, planned: Planned) -> None:
        """Fetch the bands of this version, and no others any more."""
        if self._transfer is not None and not self._up:
            self.rest()
        self._fetching = directive, planned
        wanted = {band.blob.sha256 for band in local_round.bands_of(directive, planned.intro)}
        self._disk.bands = {sha: payload for sha, payload in self._disk.bands.items() if sha in wanted}
        self._partial = {sha: size for sha, size in self._partial.items() if sha in wanted}

    def send(self, offer: Offer, ranges: Ranges, planned: Planned) -> None:
        """Send these chunks of the update in the outbox, unless they are on their way."""
        if self._sending is None or self._sending[0].blob.sha256 != offer.blob.sha256:
            self._sending = offer, ranges, planned
            self._disk.uploaded = 0.0 if self._disk.uploading != offer.blob.sha256 else self._disk.uploaded
            self._disk.uploading = offer.blob.sha256

    def go_on(self) -> None:
        """Take up what is to be moved."""
        if self._transfer is not None:
            return
        if self._sending is not None:
            self._send_on(*self._sending)
        elif self._fetching is not None:
            self._fetch_next(*self._fetching)

    def rest(self) -> None:
        """Stop, and keep the chunks that are whole."""
        if self._transfer is not None:
            self._ended(self._transfer.stop())

    def _fetch_next(self, directive: Directive, planned: Planned) -> None:
        bands = local_round.bands_of(directive, planned.intro)
        band = next((band for band in bands if band.blob.sha256 not in self._disk.bands), None)
        if band is None:
            self._fetching = None
            self._whole(directive.version)
            return
        payload = self._around.host.band(band.blob.sha256)
        if payload is not None:  # else it has retired, and a newer directive is on its way
            size = band.blob.size * planned.down_scale - self._partial.get(band.blob.sha256, 0.0)
            arrived = partial(self._fetched, band, payload)
            self._move(size, band.blob.chunk_bytes, arrived, up=False, about=band.blob.sha256)

    def _fetched(self, band: Band, payload: bytes) -> None:
        self._arrived()
        self._partial.pop(band.blob.sha256, None)
        self._disk.bands[band.blob.sha256] = payload
        self.go_on()

    def _send_on(self, offer: Offer, ranges: Ranges, planned: Planned) -> None:
        lacking = blobs.from_ranges(ranges, offer.blob.chunks)
        size = planned.up_scale * sum(offer.blob.chunk_size(index) for index in lacking)
        left = max(0.0, size - self._disk.uploaded)
        arrived = partial(self._sent, offer, lacking)
        self._move(left, offer.blob.chunk_bytes, arrived, up=True, about=offer.blob.sha256)

    def _sent(self, offer: Offer, lacking: list[int]) -> None:
        self._arrived()
        self._sending = None
        outbox, fleet = self._disk.outbox, self._around.config.fleet.name
        if outbox is not None and outbox[0].blob.sha256 == offer.blob.sha256:  # else it is settled
            chunks = blobs.split(whole(outbox[1]), offer.blob.chunk_bytes)
            for index in lacking:
                topic = topics.upload(fleet, self._person.name, offer.blob.sha256, index)
                self._around.host.say(topic, chunks[index])
        self.go_on()

    def _move(self, size: float, chunk: float, arrived: Callable[[], None], *, up: bool, about: str) -> None:
        group, ways = self._person.group, self._person.ways
        self._up, self._about, self._since = up, about, self._around.clock.now
        own, way = (group.up, ways[0]) if up else (group.down, ways[1])
        self._transfer = links.send(self._around.clock, size, own, arrived, way=way, chunk=chunk)

    def _arrived(self) -> None:
        if self._transfer is not None:
            self._ended(self._transfer.size)

    def _ended(self, kept: float) -> None:
        """Account for a transfer of which so many bytes are kept."""
        now, current = self._around.clock.now, self._sending[0].round if self._up and self._sending else 0
        number = current if self._up or self._fetching is None else self._fetching[0].round
        self._accounts.span("sending" if self._up else "receiving", self._since, now, number)
        self._accounts.spend(self._person.group.idle_watts * (now - self._since))
        self._accounts.moved(kept, up=self._up)
        if self._up:
            self._disk.uploaded += kept
        else:
            self._partial[self._about] = self._partial.get(self._about, 0.0) + kept
        self._transfer = None
