"""A device's shell over the broker in memory, and a server's end that says what the test wants it to say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.client import Client, Identity, will
from edge_runtime.keeper import Watch
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.state import DeviceState
from edge_runtime.trainer import Delivered
from edge_runtime.wire import bands, blobs, codec, topics
from edge_runtime.wire.guard import OPEN, Guard
from edge_runtime.wire.memory import MemoryBroker
from edge_runtime.wire.messages import (
    Band,
    Directive,
    Message,
    Offer,
    Report,
    Welcome,
    dump,
    load,
)
from server.aggregators.method import fresh_state
from tests.runtime.said import directive
from tests.runtime.toy import SHAPES, ToyTrainer, targets
from tests.runtime.turns import Clock

FLEET, NAME = "fleet", "a"
WELCOME = Welcome(client=NAME, fleet=FLEET)
EDGES = ((0, 2), (2, 4), (4, 8))
GOAL = targets()


class Desk:
    """A client whose turns the test takes, and the server's end of its topics."""

    def __init__(self, folder: Path, guard: Guard = OPEN) -> None:
        self.guard = guard
        self.folder, self.broker, self.clock = folder, MemoryBroker(), Clock()
        self.server = self.broker.connect("server")
        for pattern in (topics.up(FLEET, "+"), topics.status(FLEET, "+"), topics.upload(FLEET, "+", "+")):
            self.server.subscribe(pattern)
        self.notes: list[str] = []
        self.trainer = ToyTrainer(GOAL, rank=2, held=4)
        self.delivered = 0
        self.failure: Exception | None = None
        self.uploads: list[tuple[int, bytes]] = []
        self.watch = Watch(clock=self.clock)
        self.begin()

    def begin(self) -> None:
        """Start the device, as a new process does."""
        self.transport = self.broker.connect(NAME, will=will(FLEET, NAME, self.guard))
        self.disk = DeviceState(self.folder)
        self.client = Client(
            Identity(FLEET, NAME, chunk_bytes=64, guard=self.guard),
            transport=self.transport,
            state=self.disk,
            trainer=self.trainer,
            deliver=self._deliver,
            say=self.notes.append,
            watch=self.watch,
        )

    def restart(self) -> None:
        """The process is killed, and another one begins."""
        self.transport.drop()
        self.disk.close()
        self.begin()

    def tell(self, *messages: Message) -> list[Message]:
        """Say this to the device, letting it work after each message; returns what it says."""
        said = []
        for message in messages:
            if isinstance(message, Directive):
                self.server.publish(topics.directive(FLEET), dump(message), retain=True)
            else:
                self.server.publish(topics.down(FLEET, NAME), dump(message))
            said += self.work()
        return said

    def work(self, *steps: float | Callable[[], object]) -> list[Message]:
        """Let the device take all that waits for it, in one run; returns what it says, chunks of uploads aside.

        Args:
            steps: what happens meanwhile, each when nothing waits: seconds pass, or something is done.
        """
        left, idle = list(steps), 0

        def stop() -> bool:
            nonlocal idle
            idle = 0 if self.transport._something_to_take() else idle + 1
            if idle <= 2:
                return False
            if not left:
                return True
            idle, now = 0, left.pop(0)
            if callable(now):
                now()
            else:
                self.clock.now += now
            return False

        self.client.run(stop, poll=0.0)
        return self.heard()

    def heard(self) -> list[Message]:
        """What the server's end has received."""
        found = []
        while (delivery := self.server.receive(0.0)) is not None:
            delivery.ack()
            topic = topics.parse(FLEET, delivery.topic)
            assert topic is not None
            if topic.kind == "upload":
                self.uploads.append((topic.chunk, delivery.payload))
            else:
                found.append(load(delivery.payload))
        return found

    def publish(self, whole: Adapter, phase: Any = "train", round_number: int = 1, **changes: Any) -> Directive:
        """Retain an adapter's bands, and return the directive that names them."""
        found = []
        for start, stop in EDGES:
            payload = codec.encode(bands.band(whole, start, stop), "int8")
            ref = blobs.describe(payload, 256)
            for index, chunk in enumerate(blobs.split(payload, 256)):
                self.server.publish(topics.broadcast(FLEET, ref.sha256, index), chunk, retain=True)
            found.append(Band(start=start, stop=stop, blob=ref))
        return directive(phase, round_number, bands=tuple(found), **changes)

    def _deliver(self) -> Delivered:
        if self.failure is not None:
            raise self.failure
        self.delivered += 1
        return Delivered("personal", 0.25)


def adapter(seed: int = 0) -> Adapter:
    """A global adapter of rank 8 with a product."""
    draw = np.random.default_rng(seed)
    return Adapter(
        {
            name: Pair(pair.a, (0.1 * draw.standard_normal(pair.b.shape)).astype(np.float32))
            for name, pair in fresh_state(SHAPES, 8, seed).adapter.items()
        }
    )


def of(kind: type[Any], messages: Sequence[Message]) -> list[Any]:
    return [message for message in messages if isinstance(message, kind)]


def states(messages: Sequence[Message]) -> list[str]:
    """What the reports say, repetitions aside."""
    found = [message.state for message in of(Report, messages)]
    return [state for at, state in enumerate(found) if not at or found[at - 1] != state]


def offered(desk: Desk, round_number: int = 1) -> Offer:
    """Let the device train a round; returns what it offers."""
    asked = desk.publish(adapter(round_number), round_number=round_number)
    [offer] = of(Offer, desk.tell(asked, WELCOME))
    assert isinstance(offer, Offer)
    return offer
