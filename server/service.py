"""The shell around `rounds`: transport and store on one side, the pure state machine on the other.

Order of everything that arrives: store, then acknowledge, then answer. Order of everything that is decided: store,
then publish. A crash between any two of these is repaired by `rounds.resume`, because every action may be repeated.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from edge_runtime.config import Config
from edge_runtime.errors import AggregationError, AuthenticityError, CorruptPayloadError, DiskFullError, WireError
from edge_runtime.wire import blobs, topics, update
from edge_runtime.wire.guard import OPEN, Guard
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
)
from edge_runtime.wire.transport import Delivery, Transport
from server import aggregators, engines, events, offers, outcome, rounds, standing
from server.aggregators.method import Update
from server.directing import directive_of
from server.downlink import Downlink
from server.journal import Journal
from server.merging import Merging
from server.policy import policy_of
from server.resuming import Resuming
from server.shortage import Shortage, blob_of, said_once
from server.staging import Staging
from server.state import State
from server.store import Standing, Store, StoredVersion

Lead = Callable[[State, tuple[Band, ...]], Directive]
"""Given the bands of its version, what a fleet behind a gateway is asked for."""


class Service:
    """One fleet's server.

    Args:
        config: the fleet's file.
        transport: connected to the fleet's broker.
        store: opened.
        say: told a sentence for people whenever something happens.
        record: given one JSON-able mapping for each event worth measuring; see `server.journal`.
        clock: seconds, monotonic; an argument so that tests own the time.
        guard: signs what it says, and tells whom to believe.
        lead: of a fleet behind a gateway: says what the fleet above it asks for; see `open`.

    Raises:
        ConfigError: an unknown method or codec.
    """

    def __init__(  # noqa: PLR0913  each one is a seam
        self,
        config: Config,
        transport: Transport,
        store: Store,
        *,
        say: Callable[[str], None],
        record: Callable[[Mapping[str, Any]], None],
        clock: Callable[[], float] = time.monotonic,
        guard: Guard = OPEN,
        lead: Lead | None = None,
    ) -> None:
        self._config, self._transport, self._store, self._guard = config, transport, store, guard
        self._say, self._clock = say, clock
        extra = config.aggregator.model_extra or {}
        engine = engines.build(config.server, say)
        self._method = aggregators.build(config.aggregator.method, engine, **extra)
        outcome.check_least(self._method, config.rounds)
        self._rank = config.aggregator.rank or self._method.server_rank(config.adapter.max_rank)
        for name, bits in ((config.wire.codec_up, update.bits_up), (config.wire.codec_down, update.bits_down)):
            bits(name)  # raises for a codec that there is not
        self._lead = lead
        self._policy = policy_of(config, self._method, led=lead is not None)
        own = config.server
        self._journal = Journal(store, record, say)
        self._staging = Staging(store, clock, most=own.max_staged_bytes, timeout=own.upload_timeout)
        self._shortage = Shortage(clock, say)
        self._fleet = config.fleet.name
        self._downlink = Downlink(config.fleet.name, config.wire, transport, store)
        self._resuming = Resuming(clock)
        self._merging = Merging(config, self._method, self._rank, store=store, downlink=self._downlink, clock=clock)
        self._written: State | None = None
        saved = store.rounds()
        if saved is None:
            self._state, self._pending = rounds.begin(secrets.token_hex(8), config.fleet.base, clock())
        else:
            self._state, self._pending = rounds.resume(standing.load(saved, store.members()), clock())

    @property
    def state(self) -> State:
        """Where the rounds stand."""
        return self._state

    def run(self, stop: Callable[[], bool], *, poll: float = 0.5) -> State:
        """Serve until the fleet has finished or `stop()` says so; returns the last state. Ready to run again."""
        self.begin()
        while not stop() and self._state.phase != "over":
            self.turn(poll)
        return self.end()

    def begin(self) -> None:
        """Listen, and do what a former process left undone."""
        for pattern in (
            topics.up(self._fleet, "+"),
            topics.status(self._fleet, "+"),
            topics.upload(self._fleet, "+", "+"),
        ):
            self._transport.subscribe(pattern)
        self._unless_full(self._save, self._journal.write, lambda: self._perform(self._pending), self._clear)
        self._sessions, self._ticked = self._transport.sessions, self._clock()

    def turn(self, poll: float) -> bool:
        """Take one delivery, for which it waits `poll` seconds, and do what is due; whether there was one."""
        delivery = self._transport.receive(poll)
        if delivery is not None:
            self.handle(delivery)
        self._unless_full(self._ask_for_rest)
        if self._transport.sessions != self._sessions:
            # A broker that came back may have forgotten what it retained.
            self._sessions = self._transport.sessions
            self._unless_full(lambda: self._announce(again=True), self._clear)
        if self._clock() - self._ticked >= poll:
            self._ticked = self._clock()
            self.tick()
        return delivery is not None

    def end(self) -> State:
        """See that all that was said is gone, and say what there was to refuse; returns the last state."""
        self._transport.flush(10.0)
        self._journal.save()
        self._say(self._journal.summary)
        return self._state

    def open(self, asked: events.Asked, version: StoredVersion, payloads: list[bytes]) -> None:
        """Open the round that the fleet above asks for, from its version.

        Raises:
            DiskFullError: no room for the version; nothing of it happened.
        """
        self._apply(asked, lambda state: self._store.save_version(version, payloads, state))
        self._clear()

    def _save(self) -> None:
        self._store.save_rounds(standing.dump(self._state, self._written))
        self._written = self._state

    def _unless_full(self, *steps: Callable[[], None]) -> None:
        """Do what may need room; on a full disk it is done when there is some."""
        try:
            for step in steps:
                step()
        except DiskFullError as error:
            self._shortage.found(error)

    def tick(self) -> None:
        """Time passed. While the disk is full, nothing is decided by it: it is not the devices that do not move."""
        try:
            if self._shortage.lasts:
                self._state = self._state.model_copy(update={"progress_at": self._clock()})
                if self._shortage.due:
                    self._look_for_room()
                return
            self._apply(events.Tick())
            self._journal.write()
            self._journal.save()
        except DiskFullError as error:
            self._shortage.found(error)

    def _look_for_room(self) -> None:
        """Do again what a full disk may have prevented, if that is possible now."""
        self._shortage.looked()
        self._store.prove_room()
        self._save()
        self._perform(rounds.resume(self._state, self._clock())[1])
        self._journal.write()
        for delivery in self._shortage.ended():
            self.handle(delivery)

    def handle(self, delivery: Delivery) -> None:
        """Take one delivery: store what it says, acknowledge it, answer it. Nonsense is noted and dropped."""
        topic = topics.parse(self._fleet, delivery.topic)
        event: events.Event | None = None
        try:
            event = self._event(topic, delivery) if topic is not None else None
            if event is not None:
                self._apply(event)
                self._journal.write()
            for client, answer in self._guard.settle():
                self._tell(client, answer)
        except DiskFullError as error:
            self._shortage.found(error)
            if said_once(event):
                self._shortage.hold(delivery)
                return
            if topic is not None and topic.client in self._state.members:
                refusal = self._shortage.refusal(topic.client, blob_of(topic, event))
                replies: list[events.Action] = [events.Reply(topic.client, refusal)] if refusal else []
                self._unless_full(lambda: self._perform(replies))
        delivery.ack()

    def _event(self, topic: topics.Topic, delivery: Delivery) -> events.Event | None:
        """What a delivery says; what says nothing is noted, and told whoever is said to have sent it."""
        try:
            if topic.kind == "upload":
                return self._chunk(topic, delivery.payload)
            if topic.kind in {"up", "status"} and delivery.payload:
                opened = self._guard.open(delivery.topic, delivery.payload)
                return self._message(topic.client, load(opened)) if opened is not None else None
        except AuthenticityError as error:
            # Whoever is named did not say it, so nobody is told; who was recognised and refused, the guard tells.
            self._journal.dropped(f"dropped a message on {delivery.topic}: {error}", code="forged")
            self._journal.note({"event": "refused", "topic": delivery.topic, "reason": str(error)})
        except WireError as error:
            self._journal.dropped(f"dropped a message on {delivery.topic}: {error}")
            if topic.kind == "up" and topic.client in self._state.members:
                self._tell(topic.client, Rejected(code="malformed", reason=str(error)[:1024]))
        return None

    def _message(self, client: str, message: Message) -> events.Event:
        match message:
            case Hello() | Offer() | Report() if message.client == client:
                if isinstance(message, Report) and client in self._state.members:
                    self._journal.note({"event": "report", **message.model_dump(mode="json", exclude_none=True)})
                elif isinstance(message, Hello):
                    problem = self._merging.unbearable(message)
                    if problem:
                        self._perform([events.Reply(client, Rejected(code="shape", reason=problem))])
                        raise CorruptPayloadError(f"'{client}': {problem}")
                return events.Heard(message)
            case Presence() if message.client == client:
                return events.PresenceChanged(client, message.state == "online", message.instance, message.session)
            case _:
                raise CorruptPayloadError(f"a {message.type} is not what '{client}' may say here")

    def _chunk(self, topic: topics.Topic, payload: bytes) -> events.Event | None:
        offer = self._store.offer_of(topic.client)
        if offer is None or offer.blob.sha256 != topic.digest:
            return None  # accepted already, or given up: the broker repeats itself
        if not blobs.fits(offer.blob, topic.chunk, payload):
            raise CorruptPayloadError(
                f"chunk {topic.chunk} of {topic.digest[:12]} has {len(payload)} bytes, which is wrong"
            )
        new, have = self._staging.add(offer, topic.chunk, payload)
        self._resuming.moved(topic.client)
        whole = not blobs.missing(offer.blob, have)
        # A device that only repeats a chunk must not hold up the round for ever.
        return events.Moved(offer if whole else None) if new or whole else None

    def _complete(self, offer: Offer) -> None:
        """All chunks of an upload are here: check it as a whole, make it an update, or refuse it."""
        try:
            payload = blobs.join(offer.blob, self._store.chunks(offer))
        except WireError as error:
            if not self._staging.damaged(offer):
                self._refuse(offer, outcome.corrupt(offer, error))
                return
            self._journal.dropped(f"asking '{offer.client}' for its update again: {error}", code="damaged")
            self._need(offer, list(range(offer.blob.chunks)))
            return
        refusal = offers.refusal(self._state, offer, self._policy)
        if refusal is not None:
            if refusal.code != "quota":  # a buffer is being merged, and the next one takes it
                self._store.drop_upload(offer)
            self._perform([events.Reply(offer.client, refusal)])
            return
        judged = self._merging.judge(offer, payload, self._state)
        if isinstance(judged, Rejected):
            self._refuse(offer, judged)
            return
        facts: Any = {"number": self._state.round, "norm": judged, "event": outcome.stored(offer, judged, self._state)}
        self._apply(events.Stored(offer), lambda state: self._store.accept(offer, payload, state, **facts))

    def _refuse(self, offer: Offer, refusal: Rejected) -> None:
        self._store.drop_upload(offer)
        self._apply(events.Refused(offer, refusal))

    def _apply(self, event: events.Event, persist: Callable[[Standing], None] | None = None) -> None:
        before = self._state
        state, actions = rounds.step(before, event, self._clock(), self._policy)
        if persist is not None or state.model_copy(update={"progress_at": before.progress_at}) != before:
            (persist or self._store.save_rounds)(standing.dump(state, self._written))
            self._written = state
        self._state = state
        self._perform(actions)

    def _perform(self, actions: list[events.Action]) -> None:
        for action in actions:
            match action:
                case events.Reply(client, message):
                    if isinstance(message, Rejected):
                        self._journal.refused(message.code)
                    self._tell(client, message)
                case events.Stage(offer):
                    self._stage(offer)
                case events.Merge(number):
                    self._merge(number)
                case events.Announce(again):
                    self._announce(again=again)
                case events.Note(text):
                    self._say(text)

    def _stage(self, offer: Offer) -> None:
        known = self._store.offer_of(offer.client) == offer
        have = self._staging.begin(offer)
        if isinstance(have, Rejected):
            self._perform([events.Reply(offer.client, have)])
            return
        lacking = blobs.missing(offer.blob, have)
        if known and lacking:
            self._resuming.offered(offer.client)
            return
        self._resuming.settled(offer.client)
        if lacking:
            self._need(offer, lacking)
        else:
            self._complete(offer)

    def _ask_for_rest(self) -> None:
        """Answer the offers that were said again, where it is time to."""
        for client in self._resuming.due():
            offer = self._store.offer_of(client)
            if offer is not None:
                self._need(offer, blobs.missing(offer.blob, self._store.offered(offer)))

    def _need(self, offer: Offer, lacking: list[int]) -> None:
        self._tell(offer.client, Need(sha256=offer.blob.sha256, ranges=blobs.as_ranges(lacking)[:4096]))

    def _tell(self, client: str, message: Message) -> None:
        topic = topics.down(self._fleet, client)
        self._transport.publish(topic, self._guard.seal(topic, dump(message)))

    def updates(self, number: int) -> Iterator[Update]:
        """The stored updates of a round, by device, one in memory at a time."""
        return self._merging.updates(number, self._state.version)

    def _merge(self, number: int) -> None:
        if (self._state.phase, self._state.round) != ("merging", number):
            return  # done already; a second time, the same updates would be added to their own outcome
        if self._lead is not None:
            return  # the gateway reduces them; the fleet above makes the next version
        made = self._merging.next(self._state)
        if isinstance(made, AggregationError):
            self._give_up(number, made)
            return
        version, payloads, event, merged = made

        def persist(state: Standing) -> None:
            since = self._policy.since(version.version)
            self._store.save_version(version, payloads, state, event, since=since)
            for said in outcome.said(number, version.version, merged):
                self._say(said)
            self._journal.refused("excluded", len(merged.excluded))

        self._apply(events.MergeDone(version.version), persist)
        self._clear()

    def _give_up(self, number: int, error: AggregationError) -> None:
        self._journal.refused("merge")
        self._say(f"round {number}: not merged, version {self._state.version} stays: {error}")
        event = {"event": "merge refused", "round": number, "reason": str(error)}
        since = self._policy.since(self._state.version)
        self._apply(events.MergeRefused(), lambda state: self._store.close_round(state, event, since=since))

    def _clear(self) -> None:
        # What is behind has no reader left: its devices were answered when their round closed.
        self._downlink.clear(self._state.version - max(1, self._policy.reach) - 1)

    def _announce(self, *, again: bool = False) -> None:
        """Publish the bands of the current version, then the Directive that names them.

        `again`: before them, those of older versions that devices may still be fetching. If the broker takes less than
        it seemed while they are on their way, its next session brings us here again.
        """
        cut: tuple[Band, ...] = ()
        if self._state.phase != "gather":
            newest = self._state.version
            self._downlink.repeat(range(newest - self._policy.reach, newest) if again else ())
            cut = self._downlink.broadcast(self._merging.version(self._state))
        if self._lead is not None:
            asked = self._lead(self._state, cut)
        else:
            asked = directive_of(self._config, self._state, cut, rank=self._rank, method=self._method)
        topic = topics.directive(self._fleet)
        self._transport.publish(topic, self._guard.seal(topic, dump(asked)), retain=True)
