"""What hostile inputs are thrown at: the decoder and the parsers, a server's `handle`, a device's `handle`.

The parsers may refuse, by an error of the tree. The two ends may not: whatever arrives, they note it and go on; only
what ends a device's fleet life, or says that it cannot work as the server asks, may leave its `handle`, as an error of
the tree.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks import fuzz_inputs as inputs
from edge_runtime import config as settings
from edge_runtime.client import Client, Identity
from edge_runtime.errors import EdgeRuntimeError, WireError
from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.slices import Scores
from edge_runtime.state import DeviceState
from edge_runtime.trainer import AdapterSpec, Delivered, Gate, Introduction, LocalResult, StepReport, Texts, Training
from edge_runtime.wire import blobs, codec, topics
from edge_runtime.wire.memory import MemoryBroker
from edge_runtime.wire.messages import Hello, Offer, dump, load
from edge_runtime.wire.transport import Delivery
from server.service import Service
from server.store import Store

LIMIT = 1 << 20
"""Bytes that a blob may decompress to: more than any sound one here."""

Target = Callable[[bytes], None]


def parse_message(payload: bytes) -> None:
    """Read a message; one that is read can be said again, and reads the same."""
    try:
        found = load(payload)
    except WireError:
        return
    try:
        again = dump(found)
    except WireError:
        return
    if load(again) != found:
        raise AssertionError(f"{found!r} does not come back as it was said")


def decode_blob(blob: bytes) -> None:
    """Decode a blob; what decodes is finite, as `Pair` and `decode` promise."""
    try:
        found = codec.decode(blob, LIMIT)
    except WireError:
        return
    for name, pair in found.items():
        if not (abs(pair.a).max(initial=0) < float("inf") and abs(pair.b).max(initial=0) < float("inf")):
            raise AssertionError(f"layer {name!r} is not finite")


def parse_topic(text: bytes) -> None:
    """Read a topic; one that is read was written in the one way in which we write it."""
    topic = text.decode("utf-8", "replace")
    found = topics.parse(inputs.FLEET, topic)
    if found is None:
        return
    written = {
        "round": lambda: topics.directive(inputs.FLEET),
        "blob": lambda: topics.broadcast(inputs.FLEET, found.digest, found.chunk),
        "status": lambda: topics.status(inputs.FLEET, found.client),
        "up": lambda: topics.up(inputs.FLEET, found.client),
        "down": lambda: topics.down(inputs.FLEET, found.client),
        "upload": lambda: topics.upload(inputs.FLEET, found.client, found.digest, found.chunk),
    }[found.kind]()
    if written != topic:
        raise AssertionError(f"{topic!r} was read as {written!r}")


def assemble_blob(payload: bytes) -> None:
    """Take a reference out of a message, and chunks of that blob."""
    try:
        ref = blobs.BlobRef.model_validate(json.loads(payload).get("blob"))
    except (ValueError, AttributeError, RecursionError):
        return
    chunks = {index: payload[:size] for index in range(min(4, ref.chunks)) if (size := ref.chunk_size(index)) < LIMIT}
    for index, chunk in chunks.items():
        blobs.fits(ref, index, chunk)
    if ref.chunks <= len(chunks):
        try:
            blobs.join(ref, chunks)
        except WireError:
            return


class ServerTarget:
    """A server in the middle of a round, with one device that is half through its upload.

    Args:
        folder: for its store.
        draw: which topic an input arrives on.
    """

    def __init__(self, folder: Path, draw: Random) -> None:
        self._folder, self._draw = folder, draw
        self._sha = "0" * 64
        self._lives = 0
        self._seen = 0
        self._fresh()

    def __call__(self, payload: bytes) -> None:
        """Let it arrive; a server that came to the end of its rounds is replaced."""
        topic = self._draw.choice(
            (
                topics.up(inputs.FLEET, "a"), topics.up(inputs.FLEET, "a"), topics.up(inputs.FLEET, "x"),
                topics.status(inputs.FLEET, "a"), topics.upload(inputs.FLEET, "a", self._sha, self._draw.randrange(12)),
                inputs.mutated_topic(inputs.sound_topics(), self._draw),
            )
        )  # fmt: skip
        self._service.handle(Delivery(topic, payload, self._draw.random() < 0.2, _nothing))
        self._seen += 1
        # Each life sees a few thousand: long enough to be led astray, short enough not to hide what comes later.
        if self._service.state.phase != "train" or self._seen > 3000:
            self._store.close()
            self._fresh()

    def close(self) -> None:
        """End it."""
        self._store.close()

    def _fresh(self) -> None:
        self._lives += 1
        self._seen = 0
        config = settings.load(
            None,
            [
                "wire.max_upload_bytes=1048576",
                "rounds.num_rounds=50",
                "adapter.max_rank=4",
                "rounds.min_available_nodes=2",
            ],
        )
        self._store = Store(self._folder / f"server-{self._lives}")
        transport = MemoryBroker().connect("server")
        self._service = Service(config, transport, self._store, say=_nothing, record=_nothing)
        self._service.run(lambda: True, poll=0.0)
        hello = next(found for found in inputs.sound_messages() if isinstance(found, Hello))
        offer = next(found for found in inputs.sound_messages() if isinstance(found, Offer))
        self._sha = offer.blob.sha256
        payload = codec.encode(inputs.adapter(), "int8")
        for name in ("a", "b"):
            self._say(topics.up(inputs.FLEET, name), dump(hello.model_copy(update={"client": name})))
        self._say(topics.up(inputs.FLEET, "a"), dump(offer))
        self._say(topics.upload(inputs.FLEET, "a", self._sha, 0), blobs.split(payload, 64)[0])

    def _say(self, topic: str, payload: bytes) -> None:
        self._service.handle(Delivery(topic, payload, retained=False, ack=_nothing))


class NewServerTarget:
    """A server that nobody has spoken to yet: what the first device says of its layers is believed, within bounds."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0

    def __call__(self, payload: bytes) -> None:
        """Let it be the first thing that is said, by the one device that the round waits for."""
        self._count += 1
        config = settings.load(
            None, ["wire.max_upload_bytes=1048576", "adapter.max_rank=4", "rounds.min_available_nodes=1"]
        )
        store = Store(self._folder / f"new-{self._count}")
        try:
            service = Service(config, MemoryBroker().connect("server"), store, say=_nothing, record=_nothing)
            service.run(lambda: True, poll=0.0)
            service.handle(Delivery(topics.up(inputs.FLEET, "a"), payload, retained=False, ack=_nothing))
        finally:
            store.close()
            for path in (self._folder / f"new-{self._count}").iterdir():
                path.unlink()

    def close(self) -> None:
        """Nothing is open."""


class DeviceTarget:
    """A device that has planned and trains what it is told to, in no time.

    Args:
        folder: for its state.
        draw: which topic an input arrives on.
    """

    def __init__(self, folder: Path, draw: Random) -> None:
        self._folder, self._draw, self._lives = folder, draw, 0
        self._sound = [message for message in inputs.sound_messages() if message.type in {"directive", "welcome"}]
        self._fresh()

    def __call__(self, payload: bytes) -> None:
        """Let it arrive; a device that has left, or said that it cannot go on, is replaced."""
        topic = self._draw.choice(
            (
                topics.down(inputs.FLEET, "a"), topics.down(inputs.FLEET, "a"), topics.directive(inputs.FLEET),
                topics.broadcast(inputs.FLEET, self._draw.choice(self._named), self._draw.randrange(8)),
                inputs.mutated_topic(inputs.sound_topics(), self._draw),
            )
        )  # fmt: skip
        try:
            self._client.handle(Delivery(topic, payload, self._draw.random() < 0.2, _nothing))
        except EdgeRuntimeError:
            self._renew()
            return
        if self._client.left or self._draw.random() < 0.002:
            self._renew()

    def close(self) -> None:
        """End it."""
        self._disk.close()

    def _renew(self) -> None:
        self._disk.close()
        self._fresh()

    def _fresh(self) -> None:
        self._lives += 1
        self._disk = DeviceState(self._folder / f"device-{self._lives}")
        payload = codec.encode(inputs.adapter(rank=4), "int8")
        self._named = [blobs.digest(payload), "0" * 64]
        self._client = Client(
            Identity(inputs.FLEET, "a"),
            transport=MemoryBroker().connect("a"),
            state=self._disk,
            trainer=IdleTrainer(),
            deliver=lambda: Delivered("nowhere", 0.0),
            say=_nothing,
        )
        for message in self._sound[: self._draw.randrange(len(self._sound) + 1)]:
            topic = topics.directive if message.type == "directive" else lambda fleet: topics.down(fleet, "a")
            try:
                self._client.handle(Delivery(topic(inputs.FLEET), dump(message), retained=True, ack=_nothing))
            except EdgeRuntimeError:
                self._renew()


class IdleTrainer:
    """Implements `edge_runtime.trainer.Trainer` without taking any time, however much it is asked for."""

    peak_bytes = 0

    def introduce(
        self, spec: AdapterSpec, training: Training, ceiling: int | None, on_plan: Callable[[int], None]
    ) -> Introduction:
        """Always the same plan."""
        del spec, training, ceiling
        on_plan(1)
        return Introduction(inputs.SLOT, inputs.BASE, 10, "d", "fp32", "p", "s")

    def receive(self, adapter: Adapter, rows: Mapping[str, Sequence[int]] | None = None) -> None:
        """Look at it."""
        self._received = adapter, rows

    def scores(self) -> Mapping[str, Scores]:
        """Of all directions the same."""
        return {name: np.ones(pair.rank) for name, pair in self._received[0].items()}

    def evaluate(self, texts: Texts = "reported") -> float:
        """A loss."""
        del texts
        return 1.0

    def train(
        self,
        training: Training,
        round_number: int,
        on_step: Callable[[StepReport], None],
        gate: Gate,
        personal: Adapter | None = None,
    ) -> LocalResult:
        """One step, whatever is asked for."""
        del training, round_number
        gate()
        on_step(StepReport(1, 1, 1.0))
        return LocalResult(inputs.adapter() if personal is None else Adapter({}), 10, 2.0, 1.0)


def _nothing(*_: Any, **__: Any) -> None:
    """Take no notice."""


PLAIN: dict[str, tuple[str, Target]] = {
    "messages.load": ("message", parse_message),
    "codec.decode": ("blob", decode_blob),
    "topics.parse": ("topic", parse_topic),
    "blobs": ("message", assemble_blob),
}
"""Target → kind of its inputs, and the function."""

ENDS: dict[str, tuple[tuple[str, ...], Callable[[Path, Random], Any]]] = {
    "server": (("message", "message", "blob"), ServerTarget),
    "new server": (("message",), lambda folder, _: NewServerTarget(folder)),
    "device": (("message", "message", "blob"), DeviceTarget),
}
"""Target → kinds of its inputs, and what makes it."""
