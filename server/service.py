"""The shell around `rounds`: transport and store on one side, the pure state machine on the other.

Order of everything that arrives: store, then acknowledge, then answer. Order of everything that is decided: store,
then publish. A crash between any two of these is repaired by `rounds.resume`, because every action may be repeated.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from threadpoolctl import threadpool_limits

from edge_runtime.config import Config
from edge_runtime.errors import AggregationError, CorruptPayloadError, WireError
from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.algebra import changed, take
from edge_runtime.trainer import AdapterSpec, Training
from edge_runtime.wire import bands, blobs, codec, topics
from edge_runtime.wire.messages import (
    Band,
    Directive,
    Hello,
    Message,
    Need,
    Offer,
    Presence,
    Rejected,
    Report,
    dump,
    load,
    ungroup,
)
from edge_runtime.wire.transport import Delivery, Transport
from server import aggregators, rounds
from server.aggregators.method import Update, load_state, save_state
from server.store import Store, StoredVersion

ASKS: Mapping[str, Literal["gather", "train", "finish"]] = {
    "gather": "gather",
    "train": "train",
    "merging": "train",
    "finish": "finish",
    "over": "finish",
}
"""Phase of the rounds → what a Directive asks of a device."""


class Service:
    """One fleet's server.

    Args:
        config: the fleet's file.
        transport: connected to the fleet's broker.
        store: opened.
        say: told a sentence for people whenever something happens.
        record: given one JSON-able mapping for each event worth measuring.
        clock: seconds, monotonic; an argument so that tests own the time.

    Raises:
        ConfigError: an unknown method or codec.
    """

    def __init__(
        self,
        config: Config,
        transport: Transport,
        store: Store,
        *,
        say: Callable[[str], None],
        record: Callable[[Mapping[str, Any]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._transport, self._store = config, transport, store
        self._say, self._record, self._clock = say, record, clock
        extra = config.aggregator.model_extra or {}
        self._method = aggregators.build(config.aggregator.method, **extra)
        self._rank = config.aggregator.rank or self._method.server_rank(config.adapter.max_rank)
        for name in (config.wire.codec_up, config.wire.codec_down):
            codec.codec(name)
        self._policy = rounds.Policy(
            fleet=config.fleet.name,
            max_upload_bytes=config.wire.max_upload_bytes,
            seed=config.training.seed,
            **config.rounds.model_dump(),
        )
        self._fleet = config.fleet.name
        self._decoded: tuple[int, Adapter] | None = None
        saved = store.rounds()
        if saved is None:
            self._state, self._pending = rounds.begin(secrets.token_hex(8), config.fleet.base, clock())
        else:
            self._state, self._pending = rounds.resume(rounds.State.model_validate_json(saved), clock())

    @property
    def state(self) -> rounds.State:
        """Where the rounds stand."""
        return self._state

    def run(self, stop: Callable[[], bool], *, poll: float = 0.5) -> rounds.State:
        """Serve until the fleet has finished or `stop()` says so; returns the last state. Ready to run again."""
        for pattern in (
            topics.up(self._fleet, "+"),
            topics.status(self._fleet, "+"),
            topics.upload(self._fleet, "+", "+"),
        ):
            self._transport.subscribe(pattern)
        self._store.save_rounds(self._state.model_dump_json())
        self._perform(self._pending)
        sessions, ticked = self._transport.sessions, self._clock()
        while not stop() and self._state.phase != "over":
            delivery = self._transport.receive(poll)
            if delivery is not None:
                self.handle(delivery)
            if self._transport.sessions != sessions:
                # A broker that came back may have forgotten what it retained.
                sessions = self._transport.sessions
                self._perform([rounds.Announce()])
            if self._clock() - ticked >= poll:
                ticked = self._clock()
                self._apply(rounds.Tick())
        self._transport.flush(10.0)
        return self._state

    def handle(self, delivery: Delivery) -> None:
        """Take one delivery: store what it says, acknowledge it, answer it. Nonsense is noted and dropped."""
        topic = topics.parse(self._fleet, delivery.topic)
        event: rounds.Event | None = None
        try:
            if topic is not None and topic.kind == "upload":
                event = self._chunk(topic, delivery.payload)
            elif topic is not None and topic.kind in {"up", "status"} and delivery.payload:
                event = self._message(topic.client, load(delivery.payload))
        except WireError as error:
            self._say(f"dropped a message on {delivery.topic}: {error}")
        if event is not None:
            self._apply(event)  # not within the try: what goes wrong in our own work is no nonsense from outside
        delivery.ack()

    def _message(self, client: str, message: Message) -> rounds.Event:
        match message:
            case Hello() | Offer() | Report() if message.client == client:
                if isinstance(message, Report):
                    self._record({"event": "report", **message.model_dump(mode="json", exclude_none=True)})
                elif isinstance(message, Hello):
                    ungroup(message.groups)  # raises for a slot that cannot be
                return rounds.Heard(message)
            case Presence() if message.client == client:
                return rounds.PresenceChanged(client, message.state == "online")
            case _:
                raise CorruptPayloadError(f"a {message.type} is not what '{client}' may say here")

    def _chunk(self, topic: topics.Topic, payload: bytes) -> rounds.Event | None:
        offer = self._store.offer_of(topic.client)
        if offer is None or offer.blob.sha256 != topic.digest:
            return None  # accepted already, or given up: the broker repeats itself
        if not blobs.fits(offer.blob, topic.chunk, payload):
            raise CorruptPayloadError(
                f"chunk {topic.chunk} of {topic.digest[:12]} has {len(payload)} bytes, which is wrong"
            )
        have = self._store.add_chunk(offer, topic.chunk, payload)
        return rounds.Moved(offer if not blobs.missing(offer.blob, have) else None)

    def _complete(self, offer: Offer) -> None:
        """All chunks of an upload are here: check it as a whole, make it an update, or refuse it."""
        try:
            payload = blobs.join(offer.blob, self._store.chunks(offer))
            self._update(offer, payload)
        except (WireError, AggregationError) as error:
            self._store.drop_upload(offer)
            reply = Rejected(code="corrupt", reason=str(error)[:1024], sha256=offer.blob.sha256)
            self._apply(rounds.Refused(offer, reply))
            return
        self._record(
            {"event": "update", "round": offer.round, "client": offer.client, "bytes": offer.blob.size,
             "examples": offer.examples, "loss_first": offer.loss_first, "loss_last": offer.loss_last}
        )  # fmt: skip
        self._apply(rounds.Stored(offer), lambda state: self._store.accept(offer, payload, state))

    def _update(self, offer: Offer, payload: bytes) -> Update:
        """What the method merges: the slice as the device decoded it, and as it left it.

        The slice is read from the update and not from the device's hello: whoever restarts may say hello with another
        plan while the update of its former one is on its way, or waits for the merge.

        Raises:
            WireError: the payload does not decode, or is no slice of the version that it was trained from.
        """
        change = codec.decode(payload, limit=8 * self._config.wire.max_upload_bytes)
        sent = self._received(offer.version)
        for name, pair in change.items():
            known = sent.layers.get(name)
            if known is None or pair.shape != known.shape or not 0 < pair.rank <= known.rank:
                expected = f"{known.shape} at rank 1 to {known.rank}" if known else "no such layer"
                raise CorruptPayloadError(
                    f"layer '{name}' of '{offer.client}': expected {expected}, found {pair.shape} at rank {pair.rank}; "
                    "train from the version that the directive names"
                )
        received = Adapter({name: take(sent[name], range(pair.rank)) for name, pair in change.items()})
        trained = Adapter({name: changed(received[name], pair) for name, pair in change.items()})
        return Update(offer.client, float(offer.examples), received, trained)

    def _received(self, version: int) -> Adapter:
        """A version exactly as devices decoded it."""
        if self._decoded is None or self._decoded[0] != version:
            stored = self._store.version(version)
            payloads = [self._store.blob(band.blob.sha256) for band in stored.bands] if stored else [None]
            if any(payload is None for payload in payloads):
                raise CorruptPayloadError(f"version {version} has retired; train from the current one")
            self._decoded = version, bands.join([codec.decode(payload) for payload in payloads if payload is not None])
        return self._decoded[1]

    def _apply(self, event: rounds.Event, persist: Callable[[str], None] | None = None) -> None:
        before = self._state
        state, actions = rounds.step(before, event, self._clock(), self._policy)
        if persist is not None:
            persist(state.model_dump_json())
        elif state.model_copy(update={"progress_at": before.progress_at}) != before:
            self._store.save_rounds(state.model_dump_json())
        self._state = state
        self._perform(actions)

    def _perform(self, actions: list[rounds.Action]) -> None:
        for action in actions:
            match action:
                case rounds.Reply(client, message):
                    self._transport.publish(topics.down(self._fleet, client), dump(message))
                case rounds.Stage(offer):
                    lacking = blobs.missing(offer.blob, self._store.offered(offer))
                    if lacking:
                        need = Need(sha256=offer.blob.sha256, ranges=blobs.as_ranges(lacking)[:4096])
                        self._transport.publish(topics.down(self._fleet, offer.client), dump(need))
                    else:
                        self._complete(offer)
                case rounds.Merge(number):
                    self._merge(number)
                case rounds.Announce():
                    self._announce()
                case rounds.Note(text):
                    self._say(text)

    def _updates(self, number: int) -> Iterator[Update]:
        for offer, payload in self._store.updates(number):
            yield self._update(offer, payload)

    def _merge(self, number: int) -> None:
        if (self._state.phase, self._state.round) != ("merging", number):
            return  # done already; a second time, the same updates would be added to their own outcome
        base = self._version(self._state.version)
        started = self._clock()
        # The products are thin: BLAS threads gain nothing, and on busy cores they wait for each other (decision 0004).
        with threadpool_limits(1):
            merged = self._method.combine(load_state(base.state), self._updates(number))
        version, payloads = self._cut(self._state.version + 1, save_state(merged.state), merged.state.adapter)
        lost = sum(layer.lost**2 for layer in merged.layers.values()) ** 0.5
        self._record(
            {"event": "merge", "round": number, "version": version.version, "truncation": merged.truncation,
             "lost": lost, "norm": sum(layer.norm**2 for layer in merged.layers.values()) ** 0.5,
             "seconds": self._clock() - started, "band_bytes": [len(payload) for payload in payloads],
             "layers": {name: vars(layer) for name, layer in merged.layers.items()}}
        )  # fmt: skip
        self._say(f"round {number}: merged into version {version.version}, truncation error {merged.truncation:.2%}")
        self._apply(rounds.MergeDone(version.version), lambda state: self._store.save_version(version, payloads, state))
        # The version before the last one has no reader left: its devices were answered when their round closed.
        for ref in self._store.retire(version.version - 2):
            for chunk in range(ref.chunks):
                self._transport.publish(topics.broadcast(self._fleet, ref.sha256, chunk), b"", retain=True)

    def _version(self, number: int) -> StoredVersion:
        """A stored version; the first one is made when the fleet's shapes are known."""
        stored = self._store.version(number)
        if stored is not None:
            return stored
        if number != 0 or not self._state.members:
            raise AggregationError(f"version {number} is not in the store; restore the store from a backup")
        shapes = ungroup(next(iter(self._state.members.values())).hello.groups).shapes
        fresh = self._method.init(shapes, self._rank, self._config.training.seed)
        version, payloads = self._cut(0, save_state(fresh), fresh.adapter)
        self._store.save_version(version, payloads)
        return version

    def _cut(self, number: int, state: bytes, adapter: Adapter) -> tuple[StoredVersion, list[bytes]]:
        """A version's bands and their payloads."""
        wire = self._config.wire
        ranges = bands.edges_for(max(adapter.ranks.values()), wire.band_edges)
        payloads = [codec.encode(bands.band(adapter, start, stop), wire.codec_down) for start, stop in ranges]
        refs = [blobs.describe(payload, wire.chunk_bytes) for payload in payloads]
        cut = tuple(Band(start=start, stop=stop, blob=ref) for (start, stop), ref in zip(ranges, refs, strict=True))
        return StoredVersion(number, state, cut), payloads

    def _announce(self) -> None:
        """Publish the bands of the current version, then the Directive that names them."""
        cut: tuple[Band, ...] = ()
        if self._state.phase != "gather":
            cut = self._version(self._state.version).bands
            for band in cut:
                payload = self._store.blob(band.blob.sha256)
                for index, chunk in enumerate(blobs.split(payload or b"", band.blob.chunk_bytes)):
                    topic = topics.broadcast(self._fleet, band.blob.sha256, index)
                    self._transport.publish(topic, chunk, retain=True)
        self._transport.publish(topics.directive(self._fleet), dump(self._directive(cut)), retain=True)

    def _directive(self, cut: tuple[Band, ...]) -> Directive:
        config, state = self._config, self._state
        phase = ASKS[state.phase]
        steps = config.training.personal_steps if phase == "finish" else config.training.max_steps
        training = config.training.model_dump(exclude={"personal_steps", "max_steps"})
        everybody = self._policy.fraction_train == 1.0 or ASKS[state.phase] != "train"
        return Directive(
            fleet=self._fleet,
            run=state.run,
            phase=phase,
            round=state.round,
            version=state.version,
            num_rounds=self._policy.num_rounds,
            base=state.base,
            adapter=AdapterSpec(**config.adapter.model_dump(), max_held=self._rank, hold_more=self._method.hold_more),
            training=Training(max_steps=steps, **training),
            bands=cut,
            participants=None if everybody else state.asked,
            codec=config.wire.codec_up,
        )
