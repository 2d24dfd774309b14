"""A root, a gateway and the devices behind it on two real brokers; the gateway is killed in the middle of a round."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from edge_runtime.client import Client, Identity, will
from edge_runtime.lora.algebra import distance, norm
from edge_runtime.state import DeviceState
from edge_runtime.trainer import Delivered, LocalResult
from edge_runtime.wire import mqtt
from edge_runtime.wire.address import BrokerAddress
from edge_runtime.wire.broker import EmbeddedBroker, Settings, start
from server.aggregators.method import load_state
from server.store import Store
from tests.product import Launcher, until
from tests.runtime.fleets import Devices
from tests.runtime.toy import ToyTrainer, targets
from tests.runtime.turns import Fleet, fleet_config
from tests.wire.conftest import require

pytestmark = [pytest.mark.story, pytest.mark.broker, pytest.mark.timeout(300)]

DEVICES: Devices = {
    "a": partial(ToyTrainer, targets(1), rank=2, examples=10),
    "b": partial(ToyTrainer, targets(2), rank=8, examples=30),
}
CHOICES = ("wire.codec_up=fp32", "adapter.max_rank=8", "training.max_steps=3", "training.learning_rate=0.1")
ROUNDS = 2


def events(path: Path, kind: str) -> list[dict[str, object]]:
    """What a server or a gateway recorded."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [e for e in (json.loads(line) for line in lines if line.endswith("\n")) if e["event"] == kind]


@contextmanager
def device(name: str, address: BrokerAddress, folder: Path, go: threading.Event) -> Iterator[None]:
    """A device of the site, in a thread; the second one trains when it may, so that a round can be half done."""
    over, failures = threading.Event(), []
    trainer = DEVICES[name]()
    if name == "b":
        train = trainer.train

        def when_it_may(*args: Any) -> LocalResult:
            go.wait(120.0)
            return train(*args)

        trainer.train = when_it_may  # type: ignore[assignment,method-assign]

    def live() -> None:
        transport = mqtt.connect(
            address, f"edge-site-{name}", on_event=lambda _: None, random=Random(name), will=will("site", name)
        )
        disk = DeviceState(folder / name)
        try:
            Client(
                Identity("site", name), transport=transport, state=disk, trainer=trainer,
                deliver=lambda: Delivered(name, 0.0), say=lambda _: None,
            ).run(over.is_set, poll=0.05)  # fmt: skip
        except Exception as error:  # noqa: BLE001  looked at by the test's own thread
            failures.append(error)
        finally:
            transport.close()
            disk.close()

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    yield
    thread.join(0.0 if failures else 60.0)
    over.set()
    thread.join(30.0)
    assert not failures


def test_a_gateway_that_is_killed_in_mid_round_costs_nothing(tmp_path: Path) -> None:
    require("nats")
    brokers: list[EmbeddedBroker] = []
    processes = Launcher(tmp_path)
    try:
        for place in ("root", "site"):
            store = tmp_path / f"{place}-broker"
            brokers += [start("nats", store=store, settings=Settings(ack_wait_s=2.0), patience=60.0)]
        files = [
            write(tmp_path / f"{place}.toml", place, broker.address)
            for place, broker in zip(("root", "site"), brokers, strict=True)
        ]
        root = processes.start("server", "--config", str(files[0]), "--store", str(tmp_path / "root-store"))
        command = ("gateway", "--config", str(files[1]), "--upstream", str(files[0]), "--name", "site",
                   "--store", str(tmp_path / "site-store"))  # fmt: skip
        gateway = processes.start(*command)
        go, metrics = threading.Event(), tmp_path / "site-store" / "metrics.jsonl"
        with device("a", brokers[1].address, tmp_path, go), device("b", brokers[1].address, tmp_path, go):
            until(lambda: events(metrics, "update"), "an update of the first device")
            gateway.kill()
            gateway = processes.start(*command)
            go.set()
            assert gateway.ended(120.0) == 0
            assert root.ended(60.0) == 0
    finally:
        processes.end()
        for broker in brokers:
            broker.stop()
    merges = events(tmp_path / "root-store" / "metrics.jsonl", "merge")
    assert [event["round"] for event in merges] == [1, 2]
    assert apart(tmp_path) < 1e-4


def write(path: Path, place: str, address: BrokerAddress) -> Path:
    """A fleet's file: both fleets have the same choices, and the site waits for both of its devices."""
    sections: dict[str, dict[str, Any]] = {
        "fleet": {"name": place},
        "broker": {"host": address.host, "port": address.port},
        "rounds": {"num_rounds": ROUNDS, "min_available_nodes": 1 + (place == "site"), "progress_timeout": 240.0},
        "training": {"max_steps": 3, "learning_rate": 0.1, "personal_steps": 1},
        "adapter": {"max_rank": 8},
        "wire": {"codec_up": "fp32"},
    }
    lines = [
        f"[{section}]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())
        for section, keys in sections.items()
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def apart(folder: Path) -> float:
    """How far the root's global adapter is from what the flat fleet learns in memory."""
    store = Store(folder / "root-store")
    stored = store.version(ROUNDS)
    store.close()
    assert stored is not None
    found = load_state(stored.state).adapter
    wanted = Fleet(folder / "flat", fleet_config(*CHOICES, "training.personal_steps=1"), DEVICES).run().merged()
    total = sum(norm(pair) ** 2 for pair in wanted.values())
    return float((sum(distance(found[name], pair) ** 2 for name, pair in wanted.items()) / total) ** 0.5)
