"""Two devices of one name on a real broker: the younger one ends with the cure, the older one finishes."""

from __future__ import annotations

import re
import threading
import time
from functools import partial
from pathlib import Path
from random import Random

import pytest

from edge_runtime.client import Client
from edge_runtime.errors import RejectedError
from edge_runtime.identity import Identity, instance_of, will
from edge_runtime.state import DeviceState
from edge_runtime.trainer import Delivered
from edge_runtime.wire.address import BrokerAddress
from edge_runtime.wire.broker import start
from edge_runtime.wire.guard import OPEN, DeviceGuard, Guard
from edge_runtime.wire.ledger import Ledger
from edge_runtime.wire.mqtt import connect
from server.service import Service
from server.store import Store
from tests.runtime.toy import ToyTrainer, targets
from tests.runtime.turns import fleet_config
from tests.server.secrets import Secrets
from tests.wire.conftest import QUICK, require

PATIENCE = 240.0
"""Seconds that a part may take on a machine that does much else; four are enough where it does not."""


class Part:
    """A participant in a thread of its own, on a real broker."""

    def __init__(self, work) -> None:
        self.over = threading.Event()
        self.error: Exception | None = None
        self.notes: list[str] = []
        self._thread = threading.Thread(target=self._main, args=(work,), daemon=True)
        self._thread.start()

    def _main(self, work) -> None:
        try:
            work(self)
        except Exception as error:  # noqa: BLE001  looked at by the test
            self.error = error

    def ended(self) -> bool:
        self._thread.join(PATIENCE)
        return not self._thread.is_alive()


def serve(part: Part, *, address: BrokerAddress, folder: Path, secrets: Secrets | None) -> None:
    transport = connect(address, "server", on_event=part.notes.append, random=Random(0), patience=20)
    store = Store(folder)
    config = fleet_config("rounds.min_available_nodes=2", "training.personal_steps=0")
    guard = secrets.of_server() if secrets else OPEN
    service = Service(config, transport, store, say=part.notes.append, record=lambda _: None, guard=guard)
    service.run(part.over.is_set)
    transport.close()
    store.close()


def take_part(part: Part, *, address: BrokerAddress, folder: Path, name: str, secrets: Secrets | None) -> None:
    state = DeviceState(folder)
    guard: Guard = OPEN
    if secrets is not None:  # a key of its name, and counters of its own, as on two machines
        ledger = Ledger(folder / "ledger")
        guard = DeviceGuard("fleet", secrets.devices[name], [secrets.server.public], ledger)
    identity = Identity("fleet", name, 1024, instance_of(state), guard)
    transport = connect(
        address, f"edge-fleet-{name}", on_event=part.notes.append, random=Random(folder.name), patience=20,
        will=will("fleet", name, guard, identity.instance),
    )  # fmt: skip
    try:
        Client(
            identity, transport=transport, state=state, trainer=ToyTrainer(targets(), rank=2),
            deliver=lambda: Delivered("personal", 0.0), say=part.notes.append,
        ).run(part.over.is_set)  # fmt: skip
    finally:
        transport.close()
        state.close()


@pytest.mark.broker
@pytest.mark.parametrize("signed", [False, True], ids=["open", "signed"])
@pytest.mark.parametrize("kind", ["nats", "mosquitto"])
def test_the_younger_of_two_devices_with_one_name_is_told_and_the_older_one_finishes(
    tmp_path: Path, kind, signed
) -> None:
    require(kind)
    secrets = Secrets(tmp_path / "secrets", "pi", "nano") if signed else None
    with start(kind, store=tmp_path / "broker", settings=QUICK) as broker:
        device = partial(take_part, address=broker.address, secrets=secrets)
        server = Part(partial(serve, address=broker.address, folder=tmp_path / "server", secrets=secrets))
        older = Part(partial(device, folder=tmp_path / "older", name="pi"))
        deadline = time.monotonic() + PATIENCE
        while not any("joined" in note for note in server.notes) and time.monotonic() < deadline:
            time.sleep(0.05)
        younger = Part(partial(device, folder=tmp_path / "younger", name="pi"))
        assert younger.ended(), (older.notes, younger.notes)
        assert isinstance(younger.error, RejectedError)
        assert re.search("another device of this fleet is called 'pi'.*--name", str(younger.error))
        # The fleet waited for a second device; with one of another name, it begins and finishes.
        other = Part(partial(device, folder=tmp_path / "other", name="nano"))
        try:
            assert server.ended(), (server.notes, older.notes, older.error, younger.notes, other.notes)
            assert older.ended()
            assert other.ended()
        finally:
            for part in (server, older, other):
                part.over.set()
        assert (server.error, older.error, other.error) == (None, None, None)
        assert any("two devices are called 'pi'" in note for note in server.notes)
