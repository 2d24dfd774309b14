"""What the protocol costs beside its payload: one device, one round, an update of a megabyte.

The real agent, client and service talk over the broker in memory; every message is counted. What MQTT adds is computed
from its specification (3.1.1): the fixed header and its length, the topic and its length, the packet identifier, and
the acknowledgement.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.client import Client, Identity, will
from edge_runtime.config import Config, load
from edge_runtime.lora.adapter import Adapter, LayerSlot, Pair, Slot
from edge_runtime.lora.slices import Scores
from edge_runtime.state import DeviceState
from edge_runtime.trainer import (
    AdapterSpec,
    Delivered,
    Gate,
    Introduction,
    LocalResult,
    StepReport,
    Texts,
    Training,
)
from edge_runtime.wire import topics
from edge_runtime.wire.memory import MemoryBroker
from edge_runtime.wire.transport import Delivery
from server.service import Service
from server.store import Store

FLEET, NAME = "overhead", "device-0"
SIDE, RANK, LAYERS = 2048, 32, 8
"""8 layers of 2048 x 2048 at rank 32: an update of a million numbers, which int8 makes a megabyte."""
ACKNOWLEDGEMENT = 4


def framing(topic: str, size: int) -> int:
    """Bytes that MQTT adds to a payload: header, remaining length, topic and its length, identifier, PUBACK."""
    variable = 2 + len(topic.encode()) + 2
    remaining, digits = variable + size, 1
    while remaining >= 128:
        remaining, digits = remaining // 128, digits + 1
    return 1 + digits + variable + ACKNOWLEDGEMENT


class Counting:
    """A transport that notes what passes through it; everything else is the real one's."""

    def __init__(self, transport: Any, log: list[tuple[str, int]]) -> None:
        self._transport, self._log = transport, log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Note and pass on."""
        self._log.append((topic, len(payload)))
        self._transport.publish(topic, payload, retain=retain)

    def receive(self, timeout: float) -> Delivery | None:
        """Pass on and note."""
        found: Delivery | None = self._transport.receive(timeout)
        if found is not None:
            self._log.append((found.topic, len(found.payload)))
        return found


class Stand:
    """Stands in for learning, which is not under test: a change of the right size, after as many steps as asked for."""

    peak_bytes = 0

    def introduce(
        self, spec: AdapterSpec, training: Training, ceiling: int | None, on_plan: Callable[[int], None]
    ) -> Introduction:
        """Train everything at full rank."""
        del spec, training, ceiling
        on_plan(1)
        slot = {f"model.layers.{index}.self_attn.q_proj": LayerSlot(SIDE, SIDE, RANK, RANK) for index in range(LAYERS)}
        return Introduction(Slot(slot), "b" * 64, 100, "benchmark", "fp32", f"rank {RANK}", "numpy")

    def receive(self, adapter: Adapter, rows: Mapping[str, Sequence[int]] | None = None) -> None:
        """Take what arrived; all of it is trained."""
        del rows
        self._adapter = adapter

    def scores(self) -> Mapping[str, Scores]:
        """Nothing to choose among."""
        return {}

    def evaluate(self, texts: Texts = "reported") -> float:
        """Some loss."""
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
        """Noise, which no codec can shrink further."""
        del gate, personal
        for step in range(training.max_steps):
            on_step(StepReport(step + 1, training.max_steps, 1.0))
        draw = np.random.default_rng(round_number)
        return LocalResult(
            Adapter(
                {
                    name: Pair(
                        draw.standard_normal(pair.a.shape, dtype=np.float32),
                        draw.standard_normal(pair.b.shape, dtype=np.float32),
                    )
                    for name, pair in self._adapter.items()
                }
            ),
            100, 1.0, 0.9,
        )  # fmt: skip


def measure() -> dict[str, float]:
    """Bytes of payload and of everything else on this device's link in one round; `overhead` is their ratio.

    The bands that came down are payload too, but of another question: only the framing of their chunks counts.
    """
    config = load(overrides=(
        f"fleet.name={FLEET}", "rounds.num_rounds=1", "rounds.min_available_nodes=1", "wire.codec_up=int8",
        f"adapter.max_rank={RANK}", f"aggregator.rank={RANK}", "training.personal_steps=0",
    ))  # fmt: skip
    log: list[tuple[str, int]] = []
    with tempfile.TemporaryDirectory() as place:
        broker = MemoryBroker()
        device = threading.Thread(target=_device, args=(broker, Path(place), log))
        device.start()
        _server(broker, config, Path(place))
        device.join()
    return _shares(log)


def _device(broker: MemoryBroker, folder: Path, log: list[tuple[str, int]]) -> None:
    transport = broker.connect(NAME, will=will(FLEET, NAME))
    state = DeviceState(folder / "device")
    client = Client(
        Identity(FLEET, NAME),
        transport=Counting(transport, log),
        state=state, trainer=Stand(), deliver=lambda: Delivered("nowhere", 0.0), say=lambda _text: None,
    )  # fmt: skip
    client.run(lambda: False, poll=0.01)
    transport.close()
    state.close()


def _server(broker: MemoryBroker, config: Config, folder: Path) -> None:
    transport = broker.connect("server")
    store = Store(folder / "server")
    Service(config, transport, store, say=lambda _text: None, record=lambda _record: None).run(lambda: False, poll=0.01)
    transport.close()
    store.close()


def _shares(log: list[tuple[str, int]]) -> dict[str, float]:
    payload = control = frames = 0
    for topic, size in log:
        kind = topics.parse(FLEET, topic)
        frames += framing(topic, size)
        if kind is not None and kind.kind == "upload":
            payload += size
        elif kind is None or kind.kind != "blob":
            control += size
    return {
        "payload_bytes": payload, "control_bytes": control, "framing_bytes": frames, "messages": len(log),
        "overhead": (control + frames) / payload,
    }  # fmt: skip


if __name__ == "__main__":
    print(measure())
