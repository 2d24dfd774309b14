"""What a device says to its fleet and hears from it: the shell around `agent` that every kind of device shares.

It listens, keeps its presence up, repeats what is not answered, fetches bands and sends chunks. What else the agent
asks for (a plan, a round, the end) differs from one kind of device to the next, and is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edge_runtime import agent
from edge_runtime.errors import TooLargeError, WireError
from edge_runtime.fetching import Fetching
from edge_runtime.identity import Identity, offline, online
from edge_runtime.state import DeviceState
from edge_runtime.wire import blobs, topics
from edge_runtime.wire.messages import Message, Offer, dump, is_absence, load
from edge_runtime.wire.transport import Delivery, Transport

REPEAT_SECONDS = 10.0
"""How long an unanswered message waits before it is said again."""
MOST_SILENCES = 64
"""After so many of those, one after the other, the Directive is asked for once in as many: every eleven minutes."""


class Conversation:
    """One device's talk with its fleet.

    Args:
        identity: its fleet and name.
        transport: connected, with its absence as its last will.
        state: opened.
        clock: seconds, monotonic.
        say: told a sentence for people whenever something happens.
        perform: told of every action; does what is the device's own. Messages, chunks and settlements are done already.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        transport: Transport,
        state: DeviceState,
        clock: Callable[[], float],
        say: Callable[[str], None],
        perform: Callable[[agent.Action], None],
    ) -> None:
        self._identity, self._guard, self._transport = identity, identity.guard, transport
        self._name, self._fleet, self.chunk_bytes = identity.client, identity.fleet, identity.chunk_bytes
        self._disk, self._clock, self._say, self._perform = state, clock, say, perform
        outbox = state.outbox
        offer = outbox[0] if outbox else None
        self.state = agent.start(self._name, state.run, offer, state.settled, identity.instance)
        self._fetching = Fetching(self._fleet, transport, state, clock)
        self._fetched: agent.Fetched | None = None
        self._heard, self._sessions, self._silences = clock(), 0, 0

    def begin(self) -> None:
        """Say that this device is there, and listen."""
        self._be_there()
        self._transport.subscribe(topics.status(self._fleet, self._name))
        self._transport.subscribe(topics.down(self._fleet, self._name))
        self._transport.subscribe(topics.directive(self._fleet))
        self._sessions = self._transport.sessions

    def end(self) -> None:
        """Say that it is gone."""
        gone = offline(self._fleet, self._name, self._guard, self._identity.instance)
        self._transport.publish(*gone, retain=True)
        self._transport.flush(10.0)

    def go_on(self) -> None:
        """After a new session, or a long silence, say again what is not answered."""
        if self._transport.sessions != self._sessions:
            self._sessions = self._transport.sessions
            self._be_there()
            self.apply(agent.Repeat())
        elif self._clock() - self._heard >= REPEAT_SECONDS and self._transport.flush(0.0):
            # Nothing of ours is still on its way, so the silence is not that of a slow link.
            self._heard = self._clock()
            self._silences += 1
            if self.state.directive is None or _asks_after(self._silences):
                # A broker may lose a Directive, above all one that is published while a subscription begins; another
                # subscription makes it look again. It may as well have nothing to say for hours, so ever more rarely.
                self._transport.subscribe(topics.directive(self._fleet))
            self.apply(agent.Repeat())
        self._fetching.look_again(self._be_there)

    def handle(self, delivery: Delivery) -> None:
        """Take one delivery. Nonsense is said and dropped; the device goes on."""
        topic = topics.parse(self._fleet, delivery.topic)
        delivery.ack()  # nothing here is needed again: directives and bands are retained, answers can be had again
        if topic is None or not delivery.payload:
            return
        try:
            event = self._event(topic, delivery)
        except WireError as error:
            self._say(f"dropped a message on {delivery.topic}: {error}")
            return
        if event is not None:
            self.apply(event)  # not within the try: what goes wrong in our own work is no nonsense from outside

    def apply(self, event: agent.Event) -> None:
        """Let the agent take an event, and do what it asks for."""
        self.state, actions = agent.step(self.state, event)
        for action in actions:
            self._do(action)

    def fetch(self, version: int, refs: Mapping[str, blobs.BlobRef]) -> None:
        """Fetch the blobs of a version, by SHA-256, and no others."""
        self._fetched = agent.Fetched(version)
        self._fetching.begin(refs)
        if self._fetching.complete:
            self.apply(self._fetched)

    def publish(self, message: Message) -> None:
        """Say something to the server."""
        topic = topics.up(self._fleet, self._name)
        self._transport.publish(topic, self._guard.seal(topic, dump(message)))

    def _be_there(self) -> None:
        self._transport.publish(*online(self._identity, self._transport.sessions), retain=True)

    def _event(self, topic: topics.Topic, delivery: Delivery) -> agent.Event | None:
        """What a delivery says; a chunk says something once it is the last one."""
        if topic.kind == "blob":
            return self._chunk(topic, delivery.payload)
        if topic.kind == "status" and is_absence(delivery.payload):
            # The last will of a replaced connection may come late; and whoever else says it is rightly contradicted.
            self._be_there()
        opened = self._guard.open(delivery.topic, delivery.payload) if topic.kind in {"round", "down"} else None
        if opened is None:
            return None
        self._heard = self._clock()
        message = load(opened)
        self._guard.settle()
        if message != self.state.directive:  # that comes again when it is asked for, and is no news
            self._silences = 0
        return agent.Received(message)

    def _chunk(self, topic: topics.Topic, payload: bytes) -> agent.Event | None:
        if not self._fetching.take(topic.digest, topic.chunk, payload):
            return None
        self._heard = self._clock()
        return self._fetched if self._fetching.complete else None

    def _do(self, action: agent.Action) -> None:
        match action:
            case agent.Say(message):
                # An answer is due from now on, however long the work before it took.
                self._heard = self._clock()
                self.publish(message)
            case agent.SendChunks(offer, ranges):
                self._send(offer, ranges)
            case agent.Settle(number, arrived):
                self._disk.settle(number, arrived=arrived)
            case _:
                pass
        self._perform(action)

    def _send(self, offer: Offer, ranges: tuple[tuple[int, int], ...]) -> None:
        outbox = self._disk.outbox
        if outbox is None or outbox[0].blob.sha256 != offer.blob.sha256:
            return  # settled in the meantime
        chunks = blobs.split(outbox[1], offer.blob.chunk_bytes)
        for index in blobs.from_ranges(ranges, len(chunks)):
            topic = topics.upload(self._fleet, self._name, offer.blob.sha256, index)
            try:
                self._transport.publish(topic, chunks[index])
            except TooLargeError as error:
                self._recut(*outbox, error)
                return
            self._heard = self._clock()

    def _recut(self, offer: Offer, payload: bytes, error: TooLargeError) -> None:
        """Offer the same update in chunks that the broker takes."""
        self.chunk_bytes = blobs.smaller(min(self.chunk_bytes, offer.blob.chunk_bytes), self._transport.largest)
        self._say(f"{error}; the update is offered in chunks of {self.chunk_bytes} bytes instead")
        offer = offer.model_copy(update={"blob": blobs.describe(payload, self.chunk_bytes)})
        self._disk.recut_outbox(offer)
        self.apply(agent.Recut(offer))


def _asks_after(silences: int) -> bool:
    """Whether to ask for the Directive: after 1, 2, 4 … silences, and in the end once in `MOST_SILENCES`."""
    return silences.bit_count() == 1 or silences % MOST_SILENCES == 0
