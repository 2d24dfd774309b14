"""Fleets of real processes on real brokers, undisturbed and disturbed: what they learn is the same, bit for bit.

What a fleet learns is decided by its seeds, its data and its plans alone. So a fleet whose processes were interrupted,
killed and started again ends with the very adapter of a fleet that nobody disturbed: an update that was lost, counted
twice or trained from another version would show in its digest.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.files import read_peft_folder
from edge_runtime.wire.broker import EmbeddedBroker, Settings, start
from tests.product import Launcher, Running, until
from tests.story.fleet import Fleet, Part, write_examples
from tests.train.conftest import BuildTinyBase
from tests.wire.conftest import require

pytestmark = [pytest.mark.story, pytest.mark.broker, pytest.mark.torch, pytest.mark.timeout(900)]

NAMES = ("large", "middle", "small")
CHOICES = {
    "large": ("device.rank=8", "device.held=16"),
    "middle": ("device.rank=4", "device.held=8"),
    "small": ("device.rank=2", "device.held=2", "device.layers_trained=2"),
}
EVERY_UPDATE = [(number, name) for number in (1, 2) for name in NAMES]
GOES_ON = "the same command goes on from there"


class Stories:
    """Fleets of the same three devices, each on a broker of its own; what is converted is shared."""

    def __init__(self, base: Path, folder: Path) -> None:
        from edge_runtime.train.source import fingerprint, resolve  # noqa: PLC0415 - belongs to an extra

        self.fingerprint = fingerprint(resolve(str(base)))
        self.folder = folder
        # Unlike in rank, layers and data. What a memory would make of them is the plan's affair, and tested there.
        self.parts = tuple(
            Part(name, write_examples(folder / f"{name}.jsonl", seed), base, CHOICES[name])
            for seed, name in enumerate(NAMES)
        )
        self.fleets: list[Fleet] = []
        self.brokers: list[EmbeddedBroker] = []

    def fleet(self, name: str, kind: str, *rounds: str) -> Fleet:
        """A fleet that has not begun; `brokers` ends with its broker."""
        require(kind)
        folder = self.folder / name
        # What was sent and not acknowledged is sent again after two seconds instead of two minutes.
        self.brokers.append(start(kind, store=folder / "broker", settings=Settings(ack_wait_s=2.0), patience=90.0))
        processes = Launcher(folder, {"EDGE_RUNTIME_CACHE": str(self.folder / "cache")})
        self.fleets.append(Fleet(processes, self.brokers[-1].address, self.fingerprint, self.parts, rounds))
        return self.fleets[-1]

    def end(self) -> None:
        """End all processes, then the brokers."""
        for fleet in self.fleets:
            fleet.processes.end()
        for broker in self.brokers:
            broker.stop()


@pytest.fixture(scope="module")
def stories(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stories]:
    """Makes fleets, and ends whatever is left of them."""
    made = Stories(tiny_base, tmp_path_factory.mktemp("stories"))
    yield made
    made.end()


@pytest.fixture(scope="module")
def undisturbed(stories: Stories, build_tiny_base: BuildTinyBase) -> Fleet:
    """A fleet on NATS that has ended; while it gathered, a device with other weights, the stranger, wanted to join."""
    fleet = stories.fleet("undisturbed", "nats")
    fleet.parts["stranger"] = Part("stranger", stories.parts[0].data, build_tiny_base(dtype="bfloat16"))
    for name in ("server", "small", "middle", "stranger"):
        fleet.start(name)
    # The last of the three comes when the stranger has gone, so that the fleet cannot be over before it asked.
    fleet.running["stranger"].ended()
    fleet.start("large")
    fleet.codes()
    return fleet


def merged_once(fleet: Fleet) -> Adapter:
    """The final global adapter of a fleet in whose merges every update of every device counts once."""
    versions, adapter = fleet.merged()
    merges = {event["round"]: event["layers"] for event in fleet.events("merge")}

    assert versions == [0, 1, 2]
    assert sorted(set(fleet.updates())) == EVERY_UPDATE
    # The small device trains the last two of the three layers.
    expected = {name: 2 if name.startswith("model.layers.0.") else 3 for name in adapter}
    assert {
        number: {name: layer["updates"] for name, layer in layers.items()} for number, layers in merges.items()
    } == {
        1: expected,
        2: expected,
    }
    return adapter


def says_how_it_goes_on(running: Running) -> bool:
    """Whether an interrupted process ended with one clear line."""
    return [GOES_ON in line for line in running.said.splitlines()].count(True) == 1


def test_a_fleet_of_unlike_devices_finishes_and_every_process_ends_well(undisturbed: Fleet) -> None:
    assert undisturbed.codes() == {"server": 0, "stranger": 11, **dict.fromkeys(NAMES, 0)}
    merged_once(undisturbed)


def test_the_devices_of_the_story_are_really_unlike(undisturbed: Fleet) -> None:
    plans = [undisturbed.running[name].said.split("plan: ")[1].splitlines()[0] for name in NAMES]

    assert len({plan.split(", nf4")[0] for plan in plans}) == 3


def test_every_device_ends_with_a_report_of_its_losses_and_of_its_export(undisturbed: Fleet) -> None:
    done = {event["client"]: event for event in undisturbed.events("report") if event["state"] == "done"}

    assert sorted(done) == list(NAMES)
    for event in done.values():
        held_out = event["held_out"]
        assert held_out["version"] == 2
        assert len({held_out["base"], held_out["merged"], held_out["personal"]}) == 3
        assert held_out["personal"] < held_out["base"]
        assert event["export_max_logit_diff"] <= 1e-4
        assert min(event["bytes_up"], event["bytes_down"], event["peak_bytes"]) > 0


def test_the_server_records_what_each_merge_cost(undisturbed: Fleet) -> None:
    merges = undisturbed.events("merge")

    assert [event["round"] for event in merges] == [1, 2]
    assert all(0 <= event["truncation"] < 1 and event["norm"] > 0 and event["band_bytes"] for event in merges)


@pytest.mark.parametrize("name", NAMES)
def test_a_personal_adapter_loads_with_peft_onto_the_base_and_changes_what_it_says(
    undisturbed: Fleet, name: str
) -> None:
    import torch  # noqa: PLC0415 - a heavy extra
    from peft import PeftModel  # noqa: PLC0415 - a heavy extra
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - a heavy extra

    base = AutoModelForCausalLM.from_pretrained(undisturbed.parts[name].base)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = base(input_ids=tokens).logits
        model = PeftModel.from_pretrained(base, undisturbed.state_dir(name) / "personal").eval()
        after = model(input_ids=tokens).logits

    assert torch.isfinite(after).all()
    assert float((after - before).abs().max()) > 1e-2


def test_a_device_holds_no_more_of_the_global_adapter_than_its_plan_says(undisturbed: Fleet) -> None:
    held = {name: set(read_peft_folder(undisturbed.state_dir(name) / "personal").ranks.values()) for name in NAMES}

    assert held == {"large": {16}, "middle": {8}, "small": {2}}


def test_a_device_with_another_base_is_refused_in_one_line_that_names_both(
    undisturbed: Fleet, stories: Stories
) -> None:
    stranger = undisturbed.running["stranger"]
    (line,) = stranger.failure

    assert stranger.ended() == 11
    assert f"this fleet trains the base {stories.fingerprint[:16]}; yours is " in line
    assert len(set(line.split("base ")[1].split()) & set(undisturbed.running["server"].said.split())) > 0
    assert not any(event["client"] == "stranger" for event in undisturbed.events("update"))


def test_the_final_global_adapter_can_be_exported_from_the_store(undisturbed: Fleet) -> None:
    """And is opened in the engine of its format, on the fleet's own base."""
    out, base = undisturbed.folder / "exported", str(undisturbed.parts["small"].base)
    store = ["--store", str(undisturbed.store), "--out", str(out), "--base", base]
    code, _, said = undisturbed.processes.run("export", *store, "--format", "peft,native")
    _, adapter = undisturbed.merged()
    exported = read_peft_folder(out / "peft")

    assert code == 0, said
    assert "version 2 of the global adapter" in said
    assert exported.ranks == adapter.ranks
    for name, pair in adapter.items():
        np.testing.assert_allclose(exported[name].product(), pair.product(), rtol=1e-5, atol=1e-7)
    for form in ("peft", "native"):
        parity = json.loads((out / form / "parity.json").read_text())
        about = json.loads((out / form / "origin.json").read_text())
        assert parity["good"]
        assert parity["max_logit_diff"] <= 1e-4
        assert (about["version"], about["devices"]) == (2, len({client for _, client in undisturbed.updates()}))
        assert about["losses"].keys() == {"base", "global"}


def test_an_earlier_version_can_be_exported_and_one_that_never_was_is_refused(undisturbed: Fleet) -> None:
    out = undisturbed.folder / "first"
    store = ["--store", str(undisturbed.store), "--out", str(out), "--no-verify"]

    assert undisturbed.processes.run("export", *store, "--version", "1")[0] == 0
    assert read_peft_folder(out / "peft").digest() != undisturbed.merged()[1].digest()
    code, _, said = undisturbed.processes.run("export", *store, "--version", "7")
    assert code == 15
    assert "versions [0, 1, 2]; found no version 7" in said
    code, _, said = undisturbed.processes.run("export", *store)
    assert code == 15
    assert "--force" in said


def test_a_personal_adapter_can_be_exported_from_the_state_of_its_device(stories: Stories, undisturbed: Fleet) -> None:
    out, state = undisturbed.folder / "mine", undisturbed.state_dir("small")
    code, _, said = undisturbed.processes.run("export", "--state-dir", str(state), "--out", str(out))

    assert code == 0, said
    assert read_peft_folder(out / "peft").digest() == read_peft_folder(state / "personal").digest()
    named = [json.loads((folder / "adapter_config.json").read_text()) for folder in (out / "peft", state / "personal")]
    assert named[0]["base_model_name_or_path"] == named[1]["base_model_name_or_path"]
    for folder in (out / "peft", state / "personal"):
        about = json.loads((folder / "origin.json").read_text())
        assert (about["fleet"], about["device"], about["version"]) == ("story", "small", 2)
        assert about["fingerprint"] == stories.fingerprint
        assert about["losses"].keys() == {"base", "global", "personal"}
        assert json.loads((folder / "parity.json").read_text())["good"]


def test_a_device_that_has_left_stays_away_when_it_is_started_again(undisturbed: Fleet) -> None:
    """Its store is the server's last word, so the server has nothing to say either."""
    again = undisturbed.start("server")

    assert again.ended() == 0
    assert "resuming in phase 'over'" in again.said


def test_interrupted_processes_go_on_by_the_same_command_on_mosquitto(stories: Stories, undisturbed: Fleet) -> None:
    """SIGINT to a device in the middle of its training; SIGTERM to the server between two rounds."""
    fleet = stories.fleet("interrupted", "mosquitto").begin()
    until(lambda: fleet.reported("training", client="middle"), "the first step of a device")
    middle = fleet.running["middle"]
    middle.send(signal.SIGINT)
    assert middle.ended() == 130
    assert says_how_it_goes_on(middle)
    assert "Traceback" not in middle.said

    fleet.start("middle")
    until(lambda: fleet.events("merge"), "the merge of the first round")
    server = fleet.running["server"]
    server.send(signal.SIGTERM)
    assert server.ended() == 130
    assert says_how_it_goes_on(server)

    fleet.start("server")
    assert fleet.codes() == dict.fromkeys(("server", *NAMES), 0)
    assert "resuming in phase" in fleet.running["server"].said
    assert merged_once(fleet).digest() == merged_once(undisturbed).digest()


def test_a_server_and_a_broker_that_are_killed_lose_no_update_and_count_none_twice(
    stories: Stories, undisturbed: Fleet
) -> None:
    """SIGKILL to the server in the first round, while updates arrive; SIGKILL to NATS in the second."""
    fleet = stories.fleet("killed", "nats").begin()
    broker = stories.brokers[-1]
    until(lambda: fleet.events("update"), "the first update")
    fleet.running["server"].kill()
    fleet.start("server")

    until(lambda: fleet.reported("training", round_number=2), "training in the second round")
    broker.kill()
    broker.start(patience=90.0)

    assert fleet.codes() == dict.fromkeys(("server", *NAMES), 0)
    assert merged_once(fleet).digest() == merged_once(undisturbed).digest()


def test_a_fleet_that_waits_for_nobody_goes_on_without_those_that_are_stopped_and_counts_all_once(
    stories: Stories,
) -> None:
    """On Mosquitto, SIGSTOP holds a device in the middle of its training while others fill buffers; then SIGKILL."""
    fleet = stories.fleet("buffered", "mosquitto", 'mode = "buffered"', "buffer_size = 1", "max_staleness = 9").begin()
    until(lambda: fleet.reported("training", client="large"), "the first step of a device")
    large = fleet.running["large"]
    large.send(signal.SIGSTOP)
    until(lambda: fleet.events("merge"), "the merge of the first buffer, by another device")
    fleet.running["server"].kill()
    fleet.start("server")
    large.send(signal.SIGCONT)

    assert fleet.codes() == dict.fromkeys(("server", *NAMES), 0)
    versions, _ = fleet.merged()
    updates = {event["n"]: event for event in fleet.events("update")}
    merges = {event["round"]: event["layers"] for event in fleet.events("merge")}
    assert versions == [0, 1, 2]
    assert sorted(event["round"] for event in updates.values()) == [1, 2]
    last = "model.layers.2.self_attn.q_proj"
    assert {number: layers[last]["updates"] for number, layers in merges.items()} == {1: 1, 2: 1}
