"""A simulated fleet that is handed out to real devices."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from edge_runtime import config as fleets
from edge_runtime.cli import simulate
from edge_runtime.config import Config
from edge_runtime.errors import ConfigError, DataError, FingerprintMismatchError
from edge_runtime.train import data
from edge_runtime.train.planning import choose, owner_of
from profiles import catalogue
from profiles.find_card import find_card
from profiles.machine import with_reserve
from server import aggregators
from server.exchange import rank_of
from server.fitting import spec_of
from simulation import dealing, examples, people, settings
from simulation.fleet import Planning, base_of, device_of, group_of
from simulation.settings import Simulation
from tests.simulation.fleets import asked, run

DEVICES = (
    '[{device = "raspberry-pi-5", name = "pi", count = 2, owner = {rank = 2, held = 4, round_bytes = 2000000}},'
    ' {device = "jetson-orin-nano", name = "orin", memory_limit = 2000000000, data_share = 2.0}]'
)


PLANNED_ONLY = ("simulation.trainer=surrogate", "simulation.base=SmolLM2-135M")
"""A base whose shapes are known and whose files are not wanted."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Sixty labelled texts, one of them with a line separator of Unicode, which ends no row."""
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"text\u2028{number}", "label": f"l{number % 3}", "more": number} for number in range(60)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def loaded(file: Path, *overrides: str) -> tuple[Config, Simulation]:
    own = ("simulation.trainer=real", f'simulation.data=["{file}"]', "simulation.base=smollm2", "device.threads=1")
    return settings.load(None, asked(*own, *overrides, devices=DEVICES))


def test_each_device_gets_the_examples_that_its_twin_has(tmp_path: Path, file: Path) -> None:
    config, simulation = loaded(file)
    dealt = dealing.deal(config, simulation, tmp_path / "dealt")
    whole, _ = examples.load(simulation)
    twins = people.People(config, simulation, [group_of(group, config.device) for group in simulation.devices]).people

    assert [each.name for each in dealt] == [twin.name for twin in twins] == ["pi-0", "pi-1", "orin-0"]
    for each, twin in zip(dealt, twins, strict=True):
        own = fleets.load(each.configuration).device
        found = data.load_examples(own.data, limit=own.max_examples)
        assert found == [whole[number] for number in twin.data]
        assert len(data.split(found, fraction=own.eval_fraction)[0]) == twin.examples
        assert len(found) == each.examples
    rows = [row for each in dealt for row in examples.read(each.configuration.parent / "examples.jsonl")]
    assert len({row["more"] for row in rows}) == len(rows), "no example goes to two devices"


def test_most_examples_of_a_device_are_the_same_ones_both_ways(tmp_path: Path, file: Path) -> None:
    config, simulation = loaded(file, "device.max_examples=5")
    whole, _ = examples.load(simulation)
    (mine, _), *_ = examples.dealt(config, simulation, people.sizes_of(simulation)).devices
    dealt = dealing.deal(config, simulation, tmp_path / "dealt")

    assert len(mine) == 5
    own = fleets.load(dealt[0].configuration).device
    assert data.load_examples(own.data, limit=own.max_examples) == [whole[number] for number in mine]
    untouched = loaded(file)
    every = examples.dealt(*untouched, people.sizes_of(simulation)).devices[0][0]
    assert [whole[number] for number in mine] == [
        [whole[number] for number in every][index]
        for index in data.sampled([whole[number] for number in every], 5)
    ]  # fmt: skip


def test_a_device_file_says_what_the_fleet_and_its_group_say(tmp_path: Path, file: Path) -> None:
    config, simulation = loaded(file, "broker.port=4321", "wire.codec_up=fp16", "device.precision=nf4")
    pi, _, orin = dealing.deal(config, simulation, tmp_path / "dealt")
    own = fleets.load(pi.configuration)

    assert own.device.name == "pi-0"
    assert own.device.state_dir == tmp_path / "dealt" / "pi-0" / "state"
    assert (own.device.rank, own.device.held, own.device.round_bytes) == (2, 4, 2_000_000)
    assert (own.device.precision, own.device.threads, own.device.base) == ("nf4", 1, "smollm2")
    assert own.model_copy(update={"device": config.device, "simulation": config.simulation}) == config
    assert fleets.load(orin.configuration).device.memory_limit == 2_000_000_000
    assert fleets.load(orin.configuration).device.rank is None
    assert "simulation" not in pi.configuration.read_text()
    # Who deals again changes what is dealt, and nothing that a device remembers.
    state = own.device.state_dir / "kept"
    state.parent.mkdir()
    state.touch()
    assert dealing.deal(config, simulation, tmp_path / "dealt")[0] == pi
    assert state.exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("simulation.trainer=surrogate", "'surrogate' has no examples; expected trainer = 'real'"),
        ("simulation.precision=fp32", r"precision loads one base for all.*expected \[device\] precision"),
    ],
)
def test_what_no_real_device_does_is_not_dealt(tmp_path: Path, file: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        dealing.deal(*loaded(file, override), tmp_path / "dealt")
    assert not (tmp_path / "dealt").exists()


def test_the_verb_tells_who_joins_with_what(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text("")
    own = ["simulation.trainer=real", f'simulation.data=["{file}"]', "simulation.base=smollm2"]
    overrides = asked(*own, devices=DEVICES)

    assert simulate.deal(path, tmp_path / "dealt", overrides, json=True) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["device"] for each in told] == ["pi-0", "pi-1", "orin-0"]
    assert all(Path(each["configuration"]).is_file() for each in told)
    assert simulate.deal(path, tmp_path / "dealt", overrides, json=False) == 0
    assert "orin-0" in capsys.readouterr().out
    with pytest.raises(DataError, match="'pi-0' has"):
        simulate.deal(path, tmp_path / "few", [*overrides, "device.max_examples=1"], json=True)


def test_simulated_devices_heed_what_their_owners_insist_on(file: Path) -> None:
    """The plan is that of the device's own file, made by the same planner."""
    config, simulation = loaded(file, "device.precision=int8", *PLANNED_ONLY)
    card, method = find_card(simulation.base), aggregators.build("increment")
    spec, training = spec_of(config, method, rank_of(config, method)), people.training_of(config)
    planning = Planning(config, simulation, card, None)
    for settings_of in simulation.devices:
        group = group_of(settings_of, config.device)
        own = device_of(config.device, settings_of)
        expected = choose(group.profile, card, spec, training, owner_of(own), None)
        found = planning.plan(group, spec, training).plan
        assert found == replace(expected, reasons={}, next_better={})
        assert found.precision == "int8"
    pi, orin = (group_of(each, config.device) for each in simulation.devices)
    assert (planning.plan(pi, spec, training).plan.rank, pi.owner.round_bytes) == (2, 2_000_000)
    # As a real device with that limit: a reserve stays free within it.
    assert orin.profile.memory_bearable_bytes == with_reserve(2_000_000_000, "").value
    assert catalogue.device("jetson-orin-nano").memory_bearable_bytes > 2_000_000_000


def test_shorter_examples_take_less_of_the_steps_time(file: Path) -> None:
    def seconds(*overrides: str) -> list[float]:
        config, simulation = loaded(file, "adapter.max_length=128", *PLANNED_ONLY, *overrides)
        method = aggregators.build("increment")
        spec, training = spec_of(config, method, rank_of(config, method)), people.training_of(config)
        planning = Planning(config, simulation, find_card(simulation.base), None)
        planned = planning.plan(group_of(simulation.devices[0], config.device), spec, training)
        assert planned.plan.max_length == 128
        return [planned.step_seconds, planned.evaluate_seconds]

    whole, half = seconds(), seconds("simulation.example_tokens=64")
    assert whole == seconds("simulation.example_tokens=128") == seconds("simulation.example_tokens=500")
    # Opening weights and starting operations costs a pass what it costs, so half the tokens take more than half.
    assert all(0.5 * long < short < long for short, long in zip(half, whole, strict=True))


def test_an_update_of_a_surrogate_heeds_the_bytes_of_its_owner(tmp_path: Path) -> None:
    """As `auto` does on a real device: what the download leaves bounds the upload, in bytes of the base model."""
    few = '[{device = "raspberry-pi-5", count = 2, name = "pi", owner = {rank = 4, held = 8, round_bytes = 2300000}}]'
    found = [
        run(tmp_path / name, "wire.codec_up=auto", "wire.upload_bytes=10000000", devices=devices, least=2)
        for name, devices in (("few", few), ("all", few.replace(", round_bytes = 2300000", "")))
    ]
    assert found[0].devices[0].plan == found[1].devices[0].plan
    few_up, all_up = (each.versions[-1].bytes_up for each in found)
    assert few_up < 0.9 * all_up


def test_a_fleet_whose_file_names_its_base_can_be_simulated(tmp_path: Path, tiny_base: Path, file: Path) -> None:
    """A simulated device has the fleet's base, and says so: else the server would refuse it."""
    named = hashlib.sha256(b"base").hexdigest()
    assert run(tmp_path / "surrogate", f"fleet.base={named}").finished

    config, simulation = loaded(file, f"simulation.base={tiny_base}")
    found = base_of(config, simulation)
    config, simulation = loaded(file, f"simulation.base={tiny_base}", f"fleet.base={found}")
    assert base_of(config, simulation) == found
    config, simulation = loaded(file, f"simulation.base={tiny_base}", f"fleet.base={named}")
    with pytest.raises(FingerprintMismatchError, match=rf"trains the base {named}.*is {found}"):
        base_of(config, simulation)
