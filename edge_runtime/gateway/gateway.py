"""The gateway itself: `agent`, as of any device of the fleet above, whose training is the round of a subtree.

The fleet above sees one device with the weight of many. Nothing here waits: both fleets are served in turn, and what
the agent asks for (a plan, a round, the end) is done when the subtree has come that far. What must outlive a kill is in
the two stores: the device's (outbox, settled round, what is owed, the Directive that the subtree obeys) and the
subtree's (its rounds and updates), so a gateway that starts again finds where it was.

When the round above closes before the subtree's does, the increment that comes late is refused as any device's is: it
has no effect, what was owed before is owed still, and the subtree goes on with the current round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from threadpoolctl import threadpool_limits

from edge_runtime import agent, room
from edge_runtime.client import refused
from edge_runtime.config import Config
from edge_runtime.conversation import Conversation
from edge_runtime.errors import AggregationError, ConfigError, DiskFullError
from edge_runtime.gateway.reduction import Reduced, make, reduce
from edge_runtime.gateway.subtree import MANY, Subtree, method_of
from edge_runtime.identity import Identity
from edge_runtime.keeper import Watch
from edge_runtime.lora.adapter import Adapter, LayerSlot, Slot
from edge_runtime.state import DeviceState
from edge_runtime.wire import blobs, codec, update
from edge_runtime.wire.messages import (
    Directive,
    Hello,
    Offer,
    Rejected,
    Report,
    group,
    ungroup,
)
from edge_runtime.wire.transport import Transport
from server.merging import merge_facts

ABOVE = "above"
"""Fact: the Directive that the subtree obeys."""
REPORT_SECONDS = 5.0
"""How often the fleet above is told that the subtree moves."""

OpenSubtree = Callable[[str, Directive], Subtree]
"""(life of the fleet above, what it asks for) → the subtree of that life."""


class Gateway:
    """One gateway.

    Args:
        identity: its fleet above, and its name there.
        config: the subtree's file.
        transport: connected to the broker of the fleet above, with `will(…)` as its last will.
        state: opened; its memory as a device.
        subtree: opens its other half.
        say: told a sentence for people whenever something happens.
        record: given one JSON-able mapping for each increment that it makes.
        clock: seconds, monotonic.

    Raises:
        ConfigError: the subtree's method has no increments.
    """

    def __init__(  # noqa: PLR0913  each one is a seam
        self,
        identity: Identity,
        config: Config,
        *,
        transport: Transport,
        state: DeviceState,
        subtree: OpenSubtree,
        say: Callable[[str], None],
        record: Callable[[Mapping[str, Any]], None],
        clock: Callable[[], float],
    ) -> None:
        self._identity, self._config = identity, config
        self._name, self._fleet = identity.client, identity.fleet
        self._transport, self._disk, self._clock = transport, state, clock
        self._open_subtree, self._say, self._record = subtree, say, record
        self._method = method_of(config, say)
        self._conversation = Conversation(
            identity, transport=transport, state=state, clock=clock, say=say, perform=self._perform
        )
        self._below: Subtree | None = None
        self._doing: Directive | None = None
        self._told = clock()
        self._seen = 0.0

    @property
    def left(self) -> bool:
        """Whether both fleets have finished."""
        return self._conversation.state.left

    def run(self, stop: Callable[[], bool], *, poll: float = 0.5) -> None:
        """Take part above and serve below until both fleets have finished, or `stop()` says so.

        Raises:
            ConfigError: the fleet above takes no increments.
            RejectedError: its server refused this gateway.
        """
        self._disk.on_full = room.waiting(Watch(clock=self._clock, stop=stop), self._say, self._pauses)
        self._conversation.begin()
        try:
            while not stop() and not self.left:
                self._turn(poll)
        finally:
            if self._below is not None:
                self._below.end()
            self._conversation.end()

    def _turn(self, poll: float) -> None:
        wait = poll if self._below is None else 0.0
        for _ in range(MANY):
            delivery = self._transport.receive(wait)
            if delivery is None:
                break
            self._conversation.handle(delivery)
        self._conversation.go_on()
        below = self._subtree()
        if below is not None:
            below.turn(poll)
            self._work(below)

    def _subtree(self) -> Subtree | None:
        """The subtree of this life of the fleet above; there is none before the first Directive."""
        newest = self._conversation.state.directive
        if self._below is None and newest is not None and self._disk.run:
            obeyed = self._disk.fact(ABOVE)
            self._below = self._open_subtree(self._disk.run, Directive.model_validate(obeyed) if obeyed else newest)
        if self._below is not None and newest is not None and self._below.state.phase == "gather":
            self._below.above = newest
        return self._below

    # ── what the agent asked for ──────────────────────────────────────────────────────────────────────────────────

    def _work(self, below: Subtree) -> None:
        """Go on with what the agent asked for, as far as the subtree has come."""
        try:
            if self._conversation.state.busy == "planning" and below.ready:
                self._conversation.apply(agent.Planned(self._hello(below)))
            elif self._doing is not None:
                self._obey(below, self._doing)
        except DiskFullError as error:
            if self._due():
                self._say(f"{error}; this gateway tries again")

    def _obey(self, below: Subtree, directive: Directive) -> None:
        if not below.opened(directive):
            self._disk.put_fact(ABOVE, directive.model_dump(mode="json"))
            payloads = [self._disk.band(band.blob.sha256) for band in directive.bands]
            below.open(directive, [payload for payload in payloads if payload is not None])
        if directive.phase == "finish" and below.state.phase == "over":
            self._doing = None
            self._report("done", directive.round)
            self._conversation.apply(agent.Finished())
        elif directive.phase == "train" and below.complete(directive.round):
            event = self._reduced(below, directive)
            self._doing = None
            self._conversation.apply(event)
        elif below.state.progress_at != self._seen and self._due():
            self._seen = below.state.progress_at
            doing = "personalising" if directive.phase == "finish" else "training"
            done, of = len(below.state.stored), len(below.state.asked)
            self._report(doing, directive.round, step=done, steps=of)

    def _due(self) -> bool:
        """Whether it is time to say how things stand, once each `REPORT_SECONDS`."""
        if self._clock() - self._told < REPORT_SECONDS:
            return False
        self._told = self._clock()
        return True

    def _reduced(self, below: Subtree, directive: Directive) -> agent.Event:
        """Make one increment of the subtree's updates, and put it into the outbox."""
        number, rank = directive.round, self._config.aggregator.rank or directive.adapter.max_held
        owed = Adapter({}) if self._disk.owed is None else codec.decode(self._disk.owed)
        terms = update.Terms(
            directive.codec, directive.upload_bytes, self._identity.round_bytes, directive.error_feedback
        )
        try:
            with threadpool_limits(1):
                found = reduce(self._method, below.updates(number), owed, rank=rank, version=directive.version)
                made = make(found, owed, terms, rank=rank)
        except AggregationError as error:
            self._say(f"round {number} gives no increment: {error}")
            return agent.Nothing(number)
        offers = below.offers(number)
        offer = self._offer(directive, offers, found, blobs.describe(made.payload, self._conversation.chunk_bytes))
        self._disk.put_outbox(offer, made.payload, codec.encode(made.owed, "fp32"))
        facts = {"round": number, "updates": len(offers), "bytes": len(made.payload), **merge_facts(found.merged)}
        self._record({"event": "reduce", **facts, "version": directive.version})
        cut_off = f"truncation error {found.merged.truncation:.2%}"
        self._say(f"round {number}: {len(offers)} updates make one of {len(made.payload)} bytes, {made.how}, {cut_off}")
        return agent.Trained(offer, directive.run)

    def _offer(self, directive: Directive, offers: Sequence[Offer], found: Reduced, blob: blobs.BlobRef) -> Offer:
        total = sum(offer.examples for offer in offers)
        return Offer(
            client=self._name,
            run=directive.run,
            round=directive.round,
            version=directive.version,
            blob=blob,
            examples=total,
            loss_first=sum(offer.examples * offer.loss_first for offer in offers) / total,
            loss_last=sum(offer.examples * offer.loss_last for offer in offers) / total,
            kind="increment",
            weights=tuple((name, round(part)) for name, part in found.weights.items() if round(part) != total),
        )

    def _hello(self, below: Subtree) -> Hello:
        """How the subtree introduces itself: with all its examples, and every direction of every layer."""
        members = below.state.members
        first = next(iter(members.values())).hello
        held = self._conversation.state.directive.adapter.max_held if self._conversation.state.directive else 1
        shapes = ungroup(first.groups).shapes
        slot = Slot({name: LayerSlot(*shape, min(held, *shape), min(held, *shape)) for name, shape in shapes.items()})
        return Hello(
            client=self._name,
            base=first.base,
            examples=sum(member.hello.examples for member in members.values()),
            groups=group(slot),
            device=f"gateway of {len(members)} devices",
            precision=first.precision,
            plan=f"sums the increments of fleet '{self._config.fleet.name}'",
            software=first.software,
        )

    # ── the shell around the agent ────────────────────────────────────────────────────────────────────────────────

    def _perform(self, action: agent.Action) -> None:
        match action:
            case agent.MakePlan():
                self._check()
            case agent.Fetch(directive):
                self._conversation.fetch(directive.version, {band.blob.sha256: band.blob for band in directive.bands})
            case agent.Train(directive) | agent.Finish(directive):
                self._doing = directive
            case agent.Adopt(run):
                self._adopt(run)
            case agent.Wait(refusal):
                self._say(f"the server above cannot take this now and is asked again: {refusal.reason}")
            case agent.Leave(refusal):
                if isinstance(refusal, Rejected):
                    raise refused(refusal)

    def _check(self) -> None:
        directive = self._conversation.state.directive
        if directive is not None and not directive.increments:
            raise ConfigError(
                f"the fleet '{self._fleet}' merges by a method that takes no increments, which is all that a gateway "
                'has; set [aggregator] method = "increment" there'
            )

    def _adopt(self, run: str) -> None:
        """Another life of the fleet above has begun; what the subtree had done for the former one is void."""
        if self._below is not None:
            self._below.end()
            self._below = None
        self._doing = None
        self._disk.adopt(run)
        # What was under way has no meaning any more, and the new subtree's devices have yet to come: plan anew.
        self._conversation.apply(agent.Exhausted())

    def _pauses(self, reason: str) -> None:
        self._report("paused", self._doing.round if self._doing else 0, detail=reason[:1024])

    def _report(self, state: Any, number: int, **facts: Any) -> None:
        sent, received = self._transport.bytes_sent, self._transport.bytes_received
        self._conversation.publish(
            Report(client=self._name, state=state, round=number, bytes_up=sent, bytes_down=received, **facts)
        )
