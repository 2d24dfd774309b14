"""One file, run twice, by real processes over Mosquitto and in virtual time: the global adapters are the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.wire.broker import Settings, start
from server.aggregators.beside import published
from server.aggregators.method import load_state
from server.store import Store
from tests.product import PATIENCE, Launcher
from tests.story.fleet import TARGETS
from tests.wire.conftest import require

pytestmark = [pytest.mark.story, pytest.mark.broker, pytest.mark.torch, pytest.mark.timeout(900)]

WORDS = ("red", "green", "blue")
FILE = """
[rounds]
progress_timeout = {patience}
min_available_nodes = 3
num_rounds = 3
[fleet]
name = "twice"
base = "{fingerprint}"
[broker]
port = {port}
[adapter]
target_modules = {targets}
max_rank = 8
max_length = 32
regained = 2
slice = "personal"
[aggregator]
rank = 16
[training]
max_steps = 6
batch_size = 2
personal_steps = 1
[wire]
codec_up = "auto"
[device]
threads = 1
eval_examples = 2
max_examples = 14
[simulation]
trainer = "real"
base = "{base}"
data = ["{data}"]
[[simulation.devices]]
name = "large"
device = "{profile}"
owner = {{ rank = 8, held = 16, precision = "bf16", product_dtype = "fp32" }}
link = {{ up_mbit_s = 1000, down_mbit_s = 1000 }}
data_share = 2.0
[[simulation.devices]]
name = "middle"
device = "{profile}"
owner = {{ rank = 4, held = 8, precision = "nf4" }}
link = {{ up_mbit_s = 1000, down_mbit_s = 1000 }}
[[simulation.devices]]
name = "small"
device = "{profile}"
owner = {{ rank = 2, held = 2, layers_trained = 2, precision = "nf4", round_bytes = 60000 }}
link = {{ up_mbit_s = 100, down_mbit_s = 100 }}
"""
NAMES = ("large-0", "middle-0", "small-0")


class Bridge:
    """A fleet's file, and what came of it for real."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.folder = folder
        self.processes = Launcher(folder, {"EDGE_RUNTIME_CACHE": str(folder / "cache")})
        self.broker = start("mosquitto", store=folder / "broker", settings=Settings(), patience=90.0)
        from edge_runtime.train.source import fingerprint, resolve  # noqa: PLC0415 - belongs to an extra

        data = folder / "colours.jsonl"
        rows = [{"text": f"number {number}", "label": WORDS[number % 3]} for number in range(60)]
        data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        profile = folder / "this.json"
        profile.write_text(self.run("profile", "--base", str(base), "--json"), encoding="utf-8")
        self.file = folder / "fleet.toml"
        self.file.write_text(
            FILE.format(
                fingerprint=fingerprint(resolve(str(base))),
                port=self.broker.address.port, patience=PATIENCE, targets=json.dumps(TARGETS), base=base, data=data,
                profile=profile,
            ),
            encoding="utf-8",
        )  # fmt: skip

    def run(self, *arguments: str) -> str:
        """Run a verb to its good end; its standard output."""
        running = self.processes.start(*arguments, core=0)
        assert running.ended() == 0, running.said
        return running.out.read_text(encoding="utf-8")

    def really(self) -> None:
        """Server and clients, each a process, from the file and from what it deals."""
        self.run("simulate", str(self.file), "--deal", str(self.folder / "dealt"))
        running = [self.processes.start("server", "--config", str(self.file), "--store", str(self.store))]
        for core, name in enumerate(NAMES):
            own = self.folder / "dealt" / name / "device.toml"
            running.append(self.processes.start("client", "--config", str(own), core=core))
        assert [each.ended() for each in running] == [0, 0, 0, 0]

    @property
    def store(self) -> Path:
        """Of the server."""
        return self.folder / "server"

    def recorded(self, kind: str) -> list[dict[str, Any]]:
        """What the server recorded."""
        lines = (self.store / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def happened(self, kind: str) -> list[dict[str, Any]]:
        """What the simulation recorded."""
        lines = (self.folder / "simulated" / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.fixture(scope="module")
def bridge(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    """A fleet that has ended, for real and in virtual time."""
    require("mosquitto")
    made = Bridge(tiny_base, tmp_path_factory.mktemp("bridge"))
    try:
        made.really()
        made.run("simulate", str(made.file), "--out", str(made.folder / "simulated"), "--no-draw", "--json")
        yield made
    finally:
        made.processes.end()
        made.broker.stop()


def test_every_version_of_the_global_adapter_is_the_same_bytes_both_ways(bridge: Bridge) -> None:
    stores = [Store(bridge.store), Store(bridge.folder / "simulated" / "server")]
    try:
        assert stores[0].versions() == stores[1].versions() == [0, 1, 2, 3]
        for version in stores[0].versions():
            found = [store.version(version) for store in stores]
            adapters = [published(load_state(each.state)) for each in found if each is not None]
            assert adapters[0].digest() == adapters[1].digest(), f"version {version}"
    finally:
        for store in stores:
            store.close()


def test_simulated_devices_make_the_plans_of_the_real_ones(bridge: Bridge) -> None:
    planned = {event["client"]: event["detail"] for event in bridge.recorded("report") if event["state"] == "planned"}
    foreseen = {event["device"]: event["plan"] for event in bridge.happened("device")}

    assert planned == foreseen
    assert len(set(planned.values())) == 3


def test_what_devices_hold_out_and_learn_is_the_same_both_ways(bridge: Bridge) -> None:
    offered = [event for event in bridge.recorded("report") if event["state"] == "offering"]
    real = {(event["client"], event["round"]): event for event in offered}
    updates = bridge.happened("update")

    assert {(event["device"], event["round"]) for event in updates} == set(real)
    for event in updates:
        told = real[event["device"], event["round"]]["held_out"]
        assert event["held_out"] == told["merged" if event["version"] else "base"]


def test_the_server_counts_the_same_both_ways(bridge: Bridge) -> None:
    """Merged from the same updates: norms, truncation and bytes of bands, round by round."""
    told = ("round", "version", "truncation", "norm", "band_bytes", "lost", "bound", "excluded", "counted")
    merged = [event for event in bridge.happened("server") if event["what"] == "merge"]
    real, simulated = (
        [{key: event[key] for key in told} for event in events] for events in (bridge.recorded("merge"), merged)
    )

    assert real == simulated
