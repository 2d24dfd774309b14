"""Versions of the global adapter: the first one, and what a round makes of the one before it.

Each update is decoded once, into a scratch file if all of them are too many for memory. What a method then sees are
updates and a state whose layers are made when it asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from edge_runtime.config import Config
from edge_runtime.errors import AggregationError, WireError
from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.factors import only
from edge_runtime.wire import codec
from edge_runtime.wire.messages import Hello, Offer, Rejected, ungroup
from server import assigned, outcome, screening
from server import state as rounds
from server.aggregators.beside import published
from server.aggregators.method import Aggregator, Merged, Update, in_memory, load_state, save_state
from server.downlink import Downlink
from server.fitting import check, factors_of, unfit
from server.fleet import unbearable
from server.one_thread import one_thread
from server.scratch import Scratch
from server.slices import update_of
from server.store import Store, StoredVersion

Keep = Callable[[Adapter], Adapter]

DECODED = 8
"""Bytes that an upload may decompress to, and a global adapter may have, as a multiple of `wire.max_upload_bytes`."""
HARMLESS = 64 << 20
"""Bytes of a global adapter that any server bears."""


class Next(NamedTuple):
    """A version that is not stored yet: with its bands' payloads, and what is recorded of the merge that made it."""

    version: StoredVersion
    payloads: list[bytes]
    event: dict[str, Any]
    merged: Merged


class Merging:
    """What is merged in one fleet, and from what.

    Args:
        config: the fleet's file.
        method: that it names.
        rank: of the global adapter.
        store: opened.
        downlink: of the fleet.
        clock: seconds, monotonic.

    Raises:
        ConfigError: the fleet's file asks for something that the method cannot do.
    """

    def __init__(
        self,
        config: Config,
        method: Aggregator,
        rank: int,
        *,
        store: Store,
        downlink: Downlink,
        clock: Callable[[], float],
    ) -> None:
        check(config, method)
        self._config, self._method, self._rank = config, method, rank
        self._store, self._downlink, self._clock = store, downlink, clock
        self._read: tuple[int, int, list[float]] = (-1, 0, [])
        self._limits = screening.Limits(config.server.max_norm_ratio, config.server.max_update_norm)

    def unbearable(self, hello: Hello) -> str:
        """Why this server could not bear a device's layers, or its method could not merge its slices, or ''."""
        most = max(DECODED * self._config.wire.max_upload_bytes, HARMLESS)
        return unbearable(hello, self._rank + self._method.beside, most) or unfit(hello, self._method, self._rank)

    def judge(self, offer: Offer, payload: bytes, now: rounds.State) -> float | Rejected:
        """How far an upload moves the model, or why it is refused.

        Args:
            offer: whose.
            payload: its blob.
            now: where the rounds stand.
        """
        try:
            found = self._update(offer, payload, in_memory)
            plans = now.members[offer.client].plans
            # Devices that share their ranks out, or prune them, train what they say at most.
            uniform = self._config.adapter.allocation == "uniform" and not self._method.training
            assigned.check(offer, found.trained.sizes, plans, uniform=uniform)
            with one_thread():
                norm = screening.moved(found.received, found.trained)
        except (WireError, AggregationError) as error:
            return outcome.corrupt(offer, error)
        problem = screening.absurd(norm, self._yardstick(now), self._limits)
        return Rejected(code="norm", reason=problem[:1024], sha256=offer.blob.sha256) if problem else norm

    def _yardstick(self, now: rounds.State) -> list[float]:
        """As `usual`, read again when a tenth more has been accepted: a thousand for each would cost as much as it."""
        number, filled, norms = self._read
        if now.round != number or now.filled >= filled + max(1, filled // 10):
            norms = self.usual(now.round)
            self._read = now.round, now.filled, norms
        return norms

    def usual(self, number: int) -> list[float]:
        """How far updates move that were accepted in a round, and in the one before if that asked for the same."""
        alike = self._method.asks(number) == self._method.asks(number - 1)
        return self._store.norms(number, before=int(alike))

    def updates(self, number: int, version: int) -> Iterator[Update]:
        """The stored updates of a round, by device; what memory should not hold of them is on the disk.

        Args:
            number: the round whose merge takes them.
            version: that it makes another of. Those trained from older ones are discounted; they have the round of
                their training behind their device's name, for a device may have another that is not so old.

        Raises:
            DiskFullError: no room there.
        """
        return self._updates(number, version, Scratch(self._store.path.parent).put)

    def _updates(self, number: int, version: int, keep: Keep) -> Iterator[Update]:
        for offer, payload in self._store.updates(number):
            found = self._update(offer, payload, keep)
            if offer.round != number:
                age = version - offer.version
                found = replace(
                    found,
                    client=f"{offer.client}@{offer.round}",
                    discount=(1.0 + age) ** -self._config.rounds.staleness_exponent,
                )
            yield found

    def _update(self, offer: Offer, payload: bytes, keep: Keep) -> Update:
        change, directions = codec.decode_slice(payload, limit=DECODED * self._config.wire.max_upload_bytes)
        # A factor that nobody asked for is not read, whatever was sent of it.
        asked = only(change, self._method.asks(offer.round).sent)
        return update_of(offer, keep(asked), self._downlink.received(offer.version), directions)

    def version(self, now: rounds.State) -> StoredVersion:
        """The version that the rounds stand at; the first one is made when the fleet's shapes are known.

        Raises:
            AggregationError: it is not in the store.
        """
        stored = self._store.version(now.version)
        if stored is not None:
            return stored
        if now.version != 0 or not now.members:
            raise AggregationError(f"version {now.version} is not in the store; restore the store from a backup")
        shapes = ungroup(next(iter(now.members.values())).hello.groups).shapes
        fresh = self._method.init(shapes, self._rank, self._config.training.seed)
        version, payloads = self._downlink.cut(0, save_state(fresh), published(fresh), factors_of(self._method))
        self._store.save_version(version, payloads)
        return version

    def next(self, now: rounds.State) -> Next | AggregationError:
        """The version that the updates of the round make, or why they make none.

        Raises:
            AggregationError: the version that the round began with is not in the store.
            DiskFullError: no room for what memory should not hold.
        """
        keep = Scratch(self._store.path.parent).put
        base = replace(load_state(self.version(now).state), keep=keep)
        started = self._clock()
        merged = outcome.attempt(self._method, base, self._updates(now.round, now.version, keep))
        if isinstance(merged, AggregationError):
            return merged
        version, payloads = self._downlink.cut(
            now.version + 1, save_state(merged.state), published(merged.state), factors_of(self._method)
        )
        sizes = [len(payload) for payload in payloads]
        facts = {"seconds": self._clock() - started, "band_bytes": sizes}
        return Next(version, payloads, {"event": "merge", "round": now.round, **merge_facts(merged), **facts}, merged)


def merge_facts(merged: Merged) -> dict[str, Any]:
    """What is recorded of any merge: the errors of all layers together, and of each."""
    return {
        "version": merged.state.version,
        "truncation": merged.truncation,
        "lost": sum(layer.lost**2 for layer in merged.layers.values()) ** 0.5,
        "bound": sum(layer.bound**2 for layer in merged.layers.values()) ** 0.5,
        "norm": sum(layer.norm**2 for layer in merged.layers.values()) ** 0.5,
        "excluded": dict(merged.excluded),
        "counted": dict(merged.counted),
        "layers": {name: vars(layer) for name, layer in merged.layers.items()},
    }
