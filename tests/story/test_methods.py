"""Every method of the table end to end: a tiny model, real training, two devices and a server over a real broker.

Threads of one process stand for the processes of a fleet, which are tested with one method in `test_fleet`: a dozen
methods in processes of their own would spend their time on importing torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, cast

import numpy as np
import pytest

from edge_runtime import config, ways
from edge_runtime.client import Client, Identity, will
from edge_runtime.lora.adapter import Adapter
from edge_runtime.state import DeviceState
from edge_runtime.trainer import Delivered
from edge_runtime.wire.broker import EmbeddedBroker, Settings, start
from edge_runtime.wire.mqtt import connect
from server import aggregators
from server.aggregators.beside import published
from server.aggregators.method import load_state
from server.service import Service
from server.store import Store
from tests.train.devices import settings_in
from tests.wire.conftest import require

pytest.importorskip("torch")

from edge_runtime.train.local import LocalTrainer
from profiles.terms import Overrides

pytestmark = [pytest.mark.story, pytest.mark.broker, pytest.mark.torch, pytest.mark.timeout(300)]

ROUNDS = 2
RANKS = {"large": 4, "small": 2}
PARAMETERS: Mapping[str, tuple[str, ...]] = {"hetlora": ("aggregator.gamma=0.5",)}
SETTINGS = (
    "fleet.name=methods", f"rounds.num_rounds={ROUNDS}", "rounds.min_available_nodes=2", "rounds.progress_timeout=60",
    'adapter.target_modules=["q_proj","v_proj"]', "adapter.max_rank=4", "adapter.max_length=32",
    "training.max_steps=3", "training.batch_size=2", "training.warmup_steps=0", "training.personal_steps=1",
    "training.learning_rate=5e-3",
)  # fmt: skip


BROKERS = {"nats": sorted(aggregators.METHODS), "mosquitto": ["fed_sb", "fedsa_lora", "increment"]}
"""Methods over each: what travels is of few kinds, and brokers are compared in `test_fleet`."""


@pytest.fixture(scope="module")
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    require(request.param)
    running = start(request.param, store=tmp_path_factory.mktemp("broker"), settings=Settings(ack_wait_s=2.0))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def devices(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], LocalTrainer]:
    """Makes the trainer of a device; what is converted and tokenised is shared by all methods."""
    folder = tmp_path_factory.mktemp("devices")

    def made(name: str, alike: bool) -> LocalTrainer:
        rank = None if alike else RANKS[name]
        overrides = Overrides(rank=rank, precision="nf4", micro_batch=1, threads=1, compute_dtype="fp32")
        (folder / name).mkdir(exist_ok=True)
        return LocalTrainer(settings_in(folder / name, tiny_base, overrides), say=lambda _: None)

    return made


class InTurns:
    """A trainer that works while no other one does: torch's contexts are those of the process, not of a thread."""

    busy = threading.RLock()

    def __init__(self, trainer: LocalTrainer) -> None:
        self._trainer = trainer

    def __getattr__(self, name: str) -> Any:
        with self.busy:
            value = getattr(self._trainer, name)
        return self._locked(value) if callable(value) else value

    def _locked(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def work(*args: Any, **kwargs: Any) -> Any:
            with self.busy:
                return call(*args, **kwargs)

        return work


class Life:
    """What a fleet came to.

    Attributes:
        merged: the last global adapter.
        first: the first.
        records: what the server recorded.
        said: what it said, to be read where an assertion fails.
        personal: device → its own adapter at the end.
        kept: device → what it remembers of it.
    """

    def __init__(self) -> None:
        self.records: list[Mapping[str, Any]] = []
        self.said: list[str] = []
        self.personal: dict[str, Adapter] = {}
        self.kept: dict[str, tuple[dict[str, Any], bytes | None] | None] = {}
        self.errors: list[BaseException] = []
        self.first = self.merged = Adapter({})


def live(
    method: str,
    broker: EmbeddedBroker,
    devices: Callable[[str, bool], LocalTrainer],
    folder: Path,
    more: Sequence[str] = (),
    own: Mapping[str, ways.Own] | None = None,
) -> Life:
    """A fleet's life by a method, with more settings of the fleet's file and of its devices' own."""
    settings, life, stopped = _config(method, more), Life(), threading.Event()
    tag = settings.fleet.name
    alike = aggregators.build(method).equal_ranks

    def serve() -> None:
        store = Store(folder / "server")
        transport = connect(broker.address, f"{tag}-server", on_event=lambda _: None, random=Random(0))
        server = Service(settings, transport, store, say=life.said.append, record=life.records.append)
        server.run(stopped.is_set, poll=0.05)
        for number, name in ((0, "first"), (ROUNDS, "merged")):
            version = store.version(number)
            assert version is not None
            setattr(life, name, published(load_state(version.state)))
        transport.close()
        store.close()

    def take_part(name: str) -> None:
        disk, trainer = DeviceState(folder / name), cast("LocalTrainer", InTurns(devices(name, alike)))
        last = will(settings.fleet.name, name)
        transport = connect(broker.address, f"{tag}-{name}", on_event=lambda _: None, random=Random(1), will=last)

        def deliver() -> Delivered:
            life.personal[name] = trainer.personal()
            return Delivered(name, 0.0)

        Client(
            Identity(settings.fleet.name, name, chunk_bytes=1024), transport=transport, state=disk, trainer=trainer,
            deliver=deliver, say=lambda _: None, own=(own or {}).get(name),
        ).run(stopped.is_set, poll=0.05)  # fmt: skip
        transport.close()
        life.kept[name] = disk.personal
        disk.close()

    _together(life, stopped, serve, *(lambda name=name: take_part(name) for name in RANKS))
    return life


def _config(method: str, more: Sequence[str]) -> config.Config:
    name = f"fleet.name=methods-{method}".replace("_", "-")
    return config.load(None, [*SETTINGS[1:], name, f"aggregator.method={method}", *PARAMETERS.get(method, ()), *more])


def _together(life: Life, stopped: threading.Event, *works: Callable[[], None]) -> None:
    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  looked at below, in the test's own thread
            life.errors.append(error)
            stopped.set()

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    stopped.set()
    assert not life.errors
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize(
    ("broker", "method"),
    [(broker, method) for broker, methods in BROKERS.items() for method in methods],
    indirect=["broker"],
)
def test_a_fleet_learns_by_every_method_over_a_broker(
    method: str, broker: EmbeddedBroker, devices: Callable[[str, bool], LocalTrainer], tmp_path: Path
) -> None:
    life, built = live(method, broker, devices, tmp_path), aggregators.build(method)
    merges = [record for record in life.records if record["event"] == "merge"]
    assert [record["round"] for record in merges] == [1, 2], life.said
    assert {layer["updates"] for record in merges for layer in record["layers"].values()} == {2}, life.said
    done = [record for record in life.records if record.get("state") == "done"]
    assert {record["client"] for record in done} == set(RANKS)
    assert all(np.isfinite(record["held_out"]["merged"]) for record in done)
    assert life.merged.digest() != life.first.digest()
    has_model = any(pair.b.any() for pair in life.merged.values())
    assert has_model == (not built.private)
    assert all(any(pair.b.any() for pair in own.values()) for own in life.personal.values())
    ranks = {name: max(own.ranks.values()) for name, own in life.personal.items()}
    if built.equal_ranks:
        assert ranks == {"large": 4 + built.beside + built.own, "small": 4 + built.beside + built.own}
    elif not built.hold_more:
        assert ranks == {name: rank + built.beside + built.own for name, rank in RANKS.items()}
