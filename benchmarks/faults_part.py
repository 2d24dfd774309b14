"""One process of a fleet that is killed again and again: a device, or the server; started by `benchmarks.faults_fleet`.

    python -m benchmarks.faults_part server FOLDER HOST:PORT
    python -m benchmarks.faults_part NAME FOLDER HOST:PORT

Everything in it is the product, but for the trainer, whose changes are drawn from a seed instead of learnt, and a tap
on each of its borders that writes down what passes: `FOLDER/journal/NAME.jsonl`, and the payload of every update that
a device made. A line is written in one call to a file that is only appended to, so a kill loses at most the newest
one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, cast

import numpy as np

from edge_runtime import config as settings
from edge_runtime.client import Client, Identity, will
from edge_runtime.errors import WireError
from edge_runtime.lora.adapter import Adapter, LayerSlot, Pair, Slot
from edge_runtime.lora.algebra import change, cut
from edge_runtime.lora.slices import Scores
from edge_runtime.state import DeviceState
from edge_runtime.trainer import AdapterSpec, Delivered, Gate, Introduction, LocalResult, StepReport, Texts, Training
from edge_runtime.wire import mqtt, topics
from edge_runtime.wire.address import BrokerAddress
from edge_runtime.wire.messages import Accepted, Offer, Rejected, load
from edge_runtime.wire.transport import Delivery, Transport
from server.service import Service
from server.store import Store

FLEET = "faults"
BASE = "f" * 64
STEP_SECONDS = 0.05
"""What a step of training takes: a kill shall also hit a device that trains."""


def shapes(layers: int, width: int) -> dict[str, tuple[int, int]]:
    """The layers of the imaginary base."""
    return {f"model.layers.{index}.self_attn.q_proj": (width, width) for index in range(layers)}


# ── what is written down ──────────────────────────────────────────────────────────────────────────────────────────


class Journal:
    """Appends JSON lines, each with the seconds of the machine's monotonic clock and this process's id."""

    def __init__(self, folder: Path, name: str) -> None:
        self._payloads = folder / "payloads"
        self._payloads.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / f"{name}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(self._file, b"\n")  # ends a line that a kill may have cut

    def write(self, what: str, **facts: Any) -> None:
        """One line, in one call."""
        line = {"at": time.monotonic(), "life": os.getpid(), "what": what, **facts}
        os.write(self._file, (json.dumps(line) + "\n").encode())

    def keep(self, offer: Offer, payload: bytes) -> None:
        """An update that was made, durably: the payload first, then the line that names it."""
        path = self._payloads / offer.blob.sha256
        with path.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        self.write("made", offer=offer.model_dump(mode="json"))
        os.fsync(self._file)


class Tap:
    """A real thing, some of whose methods are replaced; typed as the thing by `tapped`."""

    def __init__(self, thing: object, replaced: dict[str, Callable[..., Any]]) -> None:
        self._thing, self._replaced = thing, replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced.get(name) or getattr(self._thing, name)


def watched_link(transport: Transport, journal: Journal) -> Transport:
    """A transport that writes down the chunks that leave or arrive, and the answers to offers."""

    def publish(topic: str, payload: bytes, *, retain: bool = False) -> None:
        found = topics.parse(FLEET, topic)
        if found is not None and found.kind == "upload":
            journal.write("sent", sha=found.digest, chunk=found.chunk, bytes=len(payload))
        transport.publish(topic, payload, retain=retain)

    def receive(timeout: float) -> Delivery | None:
        delivery = transport.receive(timeout)
        found = topics.parse(FLEET, delivery.topic) if delivery else None
        if delivery is None or found is None:
            return delivery
        if found.kind == "upload":
            journal.write("arrived", sha=found.digest, chunk=found.chunk, bytes=len(delivery.payload))
        elif found.kind == "down":
            _write_answer(journal, delivery.payload)
        return delivery

    return cast("Transport", Tap(transport, {"publish": publish, "receive": receive}))


def _write_answer(journal: Journal, payload: bytes) -> None:
    try:
        answer = load(payload)
    except WireError:
        return
    if isinstance(answer, Accepted):
        journal.write("accepted", sha=answer.sha256, round=answer.round)
    elif isinstance(answer, Rejected):
        journal.write("rejected", sha=answer.sha256, code=answer.code, reason=answer.reason)


def watched_state(disk: DeviceState, journal: Journal) -> DeviceState:
    """A device's state that writes down every update before it goes into the outbox."""
    put = disk.put_outbox

    def put_outbox(offer: Offer, payload: bytes, *more: Any, **named: Any) -> Any:
        journal.keep(offer, payload)
        return put(offer, payload, *more, **named)

    return cast("DeviceState", Tap(disk, {"put_outbox": put_outbox}))


def watched_store(store: Store, journal: Journal) -> Store:
    """A store that writes down which chunks it has stored, and which updates it takes: before, and when it has."""
    add, take = store.add_chunk, store.accept

    def add_chunk(offer: Offer, index: int, payload: bytes) -> Any:
        have = add(offer, index, payload)
        journal.write("stored", sha=offer.blob.sha256, chunk=index, bytes=len(payload), size=offer.blob.size)
        return have

    def accept(offer: Offer, payload: bytes, *more: Any, **named: Any) -> Any:
        facts = {"sha": offer.blob.sha256, "client": offer.client, "round": offer.round}
        journal.write("taking", **facts)
        taken = take(offer, payload, *more, **named)
        journal.write("taken", **facts)
        return taken

    return cast("Store", Tap(store, {"add_chunk": add_chunk, "accept": accept}))


# ── the trainer ───────────────────────────────────────────────────────────────────────────────────────────────────


class SeededTrainer:
    """A trainer that learns nothing: it moves the slice that it received by what a seed says.

    Implements `edge_runtime.trainer.Trainer`. Two lives of a device change a round's slice differently, as real
    training does where its data order or its hardware differ: then it matters which of the two was accepted.
    """

    def __init__(self, name: str, rank: int, layers: dict[str, tuple[int, int]]) -> None:
        self._name, self._rank, self._layers = name, rank, layers
        self._slice = Adapter({})
        self._seed = f"{name}:{os.getpid()}:{time.monotonic_ns()}"

    @property
    def peak_bytes(self) -> int:
        """Nobody asks."""
        return 0

    def introduce(
        self, spec: AdapterSpec, training: Training, ceiling: int | None, on_plan: Callable[[int], None]
    ) -> Introduction:
        """Hold all that the fleet has, train as many directions as it was made for."""
        del training, ceiling
        on_plan(1)
        slots = {
            name: LayerSlot(d_out, d_in, spec.max_held, self._rank) for name, (d_out, d_in) in self._layers.items()
        }
        return Introduction(
            slot=Slot(slots), base=BASE, examples=10 * self._rank, device="a process", precision="fp32",
            plan=f"train {self._rank}, hold {spec.max_held}", software="numpy",
        )  # fmt: skip

    def receive(self, adapter: Adapter, rows: Mapping[str, Sequence[int]] | None = None) -> None:
        """Begin from this; a walk at random goes by the first directions whatever is asked for."""
        del rows
        self._slice = Adapter({name: cut(pair, self._rank) for name, pair in adapter.items()})

    def scores(self) -> Mapping[str, Scores]:
        """Of no direction more than of another."""
        return {name: np.zeros(pair.rank) for name, pair in self._slice.items()}

    def evaluate(self, texts: Texts = "reported") -> float:
        """A number that depends on what was received."""
        del texts
        return float(np.mean([np.abs(pair.b).mean() for pair in self._slice.values()]))

    def train(
        self,
        training: Training,
        round_number: int,
        on_step: Callable[[StepReport], None],
        gate: Gate,
        personal: Adapter | None = None,
    ) -> LocalResult:
        """Walk at random, by a few percent of what a direction measures."""
        del personal
        draw = np.random.default_rng(list(f"{self._seed}:{round_number}".encode()))
        before, found = self._slice, {}
        for step in range(training.max_steps):
            if gate():
                raise KeyboardInterrupt
            time.sleep(STEP_SECONDS)
            on_step(StepReport(step + 1, training.max_steps, 1.0))
        for name, pair in before.items():
            moves = [draw.standard_normal(factor.shape, np.float32) for factor in (pair.a, pair.b)]
            found[name] = change(Pair(pair.a + 0.001 * moves[0], pair.b + 0.01 * moves[1]), pair)
        return LocalResult(Adapter(found), 10 * self._rank, 2.0, 1.0)


# ── the two kinds of process ──────────────────────────────────────────────────────────────────────────────────────


def _connected(folder: Path, name: str, address: str, journal: Journal, **named: Any) -> Transport:
    host, _, port = address.rpartition(":")
    transport = mqtt.connect(
        BrokerAddress(host, int(port)), f"edge-{FLEET}-{name}", on_event=say, random=Random(os.getpid()), **named
    )
    # From here on it is in service; whoever kills it may want to know.
    (folder / f"{name}.up").write_text(str(os.getpid()), encoding="utf-8")
    journal.write("began")
    return watched_link(transport, journal)


def say(text: str) -> None:
    """To the log of this process."""
    print(f"{time.monotonic():.3f} {text}", file=sys.stderr, flush=True)


def serve(folder: Path, address: str) -> None:
    """Be the server, until the fleet has finished."""
    config = settings.load(folder / "fleet.toml")
    journal = Journal(folder / "journal", "server")
    store = Store(folder / "server")
    transport = _connected(folder, "server", address, journal)
    service = Service(config, transport, watched_store(store, journal), say=say, record=lambda _: None)
    service.run(lambda: False, poll=0.1)
    transport.close()
    store.close()


def take_part(folder: Path, name: str, address: str) -> None:
    """Be a device, until it has left."""
    config = settings.load(folder / "fleet.toml")
    made = json.loads((folder / "devices.json").read_text(encoding="utf-8"))
    journal = Journal(folder / "journal", name)
    disk = DeviceState(folder / name)
    trainer = SeededTrainer(name, made["ranks"][name], shapes(made["layers"], made["width"]))
    transport = _connected(folder, name, address, journal, will=will(FLEET, name))
    client = Client(
        Identity(FLEET, name, config.wire.chunk_bytes),
        transport=transport,
        state=watched_state(disk, journal),
        trainer=trainer,
        deliver=lambda: Delivered("nowhere", 0.0),
        say=say,
    )
    client.run(lambda: False, poll=0.1)
    journal.write("left")
    transport.close()
    disk.close()


def main(arguments: list[str]) -> None:
    """NAME FOLDER HOST:PORT, where the name 'server' makes the server."""
    name, folder, address = arguments
    if name == "server":
        serve(Path(folder), address)
    else:
        take_part(Path(folder), name, address)


if __name__ == "__main__":
    main(sys.argv[1:])
