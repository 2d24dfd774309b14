"""A server whose turns the test takes, and devices that say what the test wants them to say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_runtime.lora import slices
from edge_runtime.lora.adapter import Adapter, Slot
from edge_runtime.lora.algebra import cut
from edge_runtime.trainer import AdapterSpec
from edge_runtime.wire import bands, blobs, codec, topics
from edge_runtime.wire.guard import OPEN, Guard
from edge_runtime.wire.memory import MemoryBroker
from edge_runtime.wire.messages import (
    Accepted,
    Directive,
    Hello,
    Message,
    Need,
    Offer,
    dump,
    group,
    load,
)
from server.service import Service
from server.store import Store
from tests.runtime.toy import SHAPES, ToyTrainer, targets
from tests.runtime.turns import Clock, Fuse, fleet_config, guarded

FLEET = "fleet"
LAYER = next(iter(SHAPES))
GOAL = targets()


class Bench:
    """A server whose turns the test takes, and what it said."""

    def __init__(self, folder: Path, *overrides: str, broker: MemoryBroker | None = None, guard: Guard = OPEN) -> None:
        self.guard = guard
        self.folder, self.broker, self.clock = folder, broker or MemoryBroker(), Clock()
        self.config = fleet_config(*overrides)
        self.notes: list[str] = []
        self.records: list[Mapping[str, Any]] = []
        self.begin()

    def begin(self, fuse: Fuse | None = None) -> None:
        """Open the store and serve, as a new process does."""
        self.transport = self.broker.connect("server")
        self.store = Store(self.folder / "server")
        self.service = Service(
            self.config,
            guarded(self.transport, fuse) if fuse else self.transport,
            guarded(self.store, fuse) if fuse else self.store,
            say=self.notes.append,
            record=self.records.append,
            clock=self.clock,
            guard=self.guard,
        )
        self.service.run(lambda: True, poll=0.0)

    def restart(self) -> None:
        """The process ends here, and another one begins."""
        self.store.close()
        self.begin()

    def wait(self, seconds: float = 2.0) -> None:
        """Let that time pass: whatever the server does by itself is done."""
        self.clock.now += seconds
        turns = iter((False, True))
        self.service.run(lambda: next(turns), poll=0.0)

    def pump(self) -> None:
        """Take all deliveries that are there."""
        while (delivery := self.transport.receive(0.0)) is not None:
            self.service.handle(delivery)

    @property
    def directive(self) -> Directive:
        """What is retained for devices."""
        found = load(self.broker.retained[topics.directive(FLEET)])
        assert isinstance(found, Directive)
        return found

    def broadcast(self, directive: Directive | None = None) -> Adapter:
        """The global adapter, as a device decodes it from the retained chunks."""
        parts = []
        for band in (directive or self.directive).bands:
            chunks = {
                index: self.broker.retained[topics.broadcast(FLEET, band.blob.sha256, index)]
                for index in range(band.blob.chunks)
            }
            parts.append((band, codec.decode(blobs.join(band.blob, chunks))))
        return bands.assembled(parts)


class Hand:
    """A device that says what the test wants it to say."""

    def __init__(self, bench: Bench, name: str, rank: int = 2, guard: Guard = OPEN) -> None:
        self.bench, self.name, self.guard = bench, name, guard
        self.trainer = ToyTrainer(GOAL, rank=rank)
        self.transport = bench.broker.connect(name)
        self.transport.subscribe(topics.down(FLEET, name))

    def say(self, message: Message, *, topic: str = "") -> list[Message]:
        """Publish a message; returns what the server answers."""
        topic = topic or topics.up(FLEET, self.name)
        self.transport.publish(topic, self.guard.seal(topic, dump(message)))
        return self.heard()

    def heard(self) -> list[Message]:
        """What the server says to this device."""
        self.bench.pump()
        found = []
        while (delivery := self.transport.receive(0.0)) is not None:
            delivery.ack()
            found.append(load(delivery.payload))
        return found

    def hello(self, **changes: Any) -> list[Message]:
        """Plan as the directive says, and say hello."""
        return self.say(self.introduction(self.bench.directive.adapter).model_copy(update=changes))

    def introduced(self, asked: Directive) -> Slot:
        """What it plans for a directive."""
        return self.trainer.introduce(asked.adapter, asked.training, None, lambda _: None).slot

    def introduction(self, spec: AdapterSpec) -> Hello:
        """What it would say of itself."""
        intro = self.trainer.introduce(spec, self.bench.directive.training, None, lambda _: None)
        return Hello(
            client=self.name,
            base=intro.base,
            examples=intro.examples,
            groups=group(intro.slot),
            device=intro.device,
            precision=intro.precision,
            plan=intro.plan,
            software=intro.software,
        )

    def train(self, directive: Directive | None = None) -> tuple[Offer, bytes]:
        """A local round from what is retained now."""
        asked = directive or self.bench.directive
        slot = self.introduced(asked)
        whole = self.bench.broadcast(asked)
        received = Adapter({name: cut(whole[name], rank) for name, rank in slot.held.items()})
        rows = slices.choose(asked.adapter.slice, received, slot.trained, asked.version)
        self.trainer.receive(received, rows)
        result = self.trainer.train(asked.training, asked.round, lambda _: None, lambda: False)
        return self.offer_of(codec.encode(result.change, asked.codec, rows), asked)

    def offer_of(self, payload: bytes, directive: Directive | None = None) -> tuple[Offer, bytes]:
        """An offer of any bytes for the open round."""
        asked = directive or self.bench.directive
        ref = blobs.describe(payload, 64)
        offer = Offer(
            client=self.name,
            round=asked.round,
            version=asked.version,
            blob=ref,
            examples=self.trainer.examples,
            loss_first=2.0,
            loss_last=1.0,
        )
        return offer, payload

    def send(self, offer: Offer, payload: bytes, indices: list[int] | None = None) -> list[Message]:
        """Publish chunks of an offered blob, or all of them; returns what the server answers."""
        chunks = blobs.split(payload, offer.blob.chunk_bytes)
        for index in range(len(chunks)) if indices is None else indices:
            self.transport.publish(topics.upload(FLEET, self.name, offer.blob.sha256, index), chunks[index])
        return self.heard()

    def deliver(self, offer: Offer, payload: bytes) -> list[Message]:
        """Offer, and send what is needed."""
        answers = self.say(offer)
        if not answers:  # an offer that is said again is answered later
            self.bench.wait()
            answers = self.heard()
        [need] = answers
        assert isinstance(need, Need)
        return self.send(offer, payload)


def training(bench: Bench, ranks: Mapping[str, int] | None = None) -> list[Hand]:
    """Devices that have joined; the first round is open."""
    hands = [Hand(bench, name, rank) for name, rank in (ranks or {"a": 2, "b": 4}).items()]
    for hand in hands:
        hand.hello()
    assert bench.directive.phase == "train"
    return hands


def accepted(offer: Offer) -> Accepted:
    return Accepted(sha256=offer.blob.sha256, round=offer.round)
