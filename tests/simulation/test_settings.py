from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime import config
from edge_runtime.errors import ConfigError
from simulation import running, settings
from tests.simulation.fleets import asked

FILE = """
[fleet]
name = "greenhouses"
[simulation]
seed = 3
[simulation.sites.north]
up_mbit_s = 10
[[simulation.devices]]
device = "raspberry-pi-5"
count = 3
site = "north"
battery = { capacity_wh = 20 }
"""


def test_one_file_is_that_of_a_real_fleet_and_of_a_simulation(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(FILE)
    found, simulation = settings.load(path, ["simulation.partition.alpha=0.7", "rounds.num_rounds=9"])
    assert (found.fleet.name, found.rounds.num_rounds) == ("greenhouses", 9)
    assert (simulation.seed, simulation.partition.alpha) == (3, 0.7)
    assert simulation.devices[0].battery is not None
    # What `server` reads is the file as well, and writes it as it was.
    assert (config.load(path).simulation.model_extra or {})["seed"] == 3
    again = tmp_path / "again.toml"
    again.write_text(config.dump(config.load(path)))
    assert settings.load(again)[1] == settings.load(path)[1]


def test_threads_are_those_of_the_fleets_devices_unless_it_says_otherwise() -> None:
    asked_for = ((), ("device.threads=2",), ("device.threads=2", "simulation.threads=3"))
    assert [settings.load(None, asked(*each))[1].threads for each in asked_for] == [1, 2, 3]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("simulation.sed=1", "unknown key 'sed'; expected one of: base"),
        ("simulation.partition={kid=1}", r"simulation\.partition\.kid: unknown key.*alpha, kind"),
        ('simulation.devices=[{device="raspberry-pi-5", cout=1}]', "unknown key 'cout'.*count"),
        (
            'simulation.devices=[{device="jetson-nano", owner={rankk=1}}]',
            r"devices\.0\.owner: unknown key of \[device\] for a group 'rankk'.*expected one of:.*rank",
        ),
        ('simulation.devices=[{device="jetson-nano", owner={data="x"}}]', "for a group 'data'"),
        ('simulation.devices=[{device="jetson-nano", owner={rank=0}}]', r"owner\.rank: input should be greater"),
        ("simulation.devices=[]", "simulation.devices: tuple should have at least 1 item"),
        ('simulation.devices=[{device="jetson-nano"}, {device="jetson-nano"}]', "two groups of devices are called"),
        ('simulation.devices=[{device="jetson-nano", site="x"}]', "unknown site 'x'"),
        ("simulation.trainer=real", "needs data"),
        ("simulation.ray_address=a:1", "ray_address is for engine = 'ray'"),
        ("simulation.engine=magic", "simulation.engine: input should be 'inline', 'processes' or 'ray'"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings.load(None, asked(override))


@pytest.mark.parametrize("asked", ["way=beside", "proximal=0.1", "rank=2", "every=1"])
def test_personal_training_that_is_not_simulated_is_refused(tmp_path: Path, asked: str) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(FILE)
    settings.load(path, ["personal.way=finetune"])
    with pytest.raises(ConfigError, match=rf"personal\.{asked.partition('=')[0]} = .* is not simulated"):
        settings.load(path, [f"personal.{asked}"])


def test_a_file_without_a_simulation_is_none() -> None:
    with pytest.raises(ConfigError, match=r"no \[simulation\]"):
        settings.load(None)


def test_a_sweep_is_every_combination() -> None:
    found = list(settings.sweeps(["aggregator.method=increment,svd", 'adapter.target_modules=["q","k"],["v"]']))
    assert found == [
        (f"aggregator.method={method}", f"adapter.target_modules={modules}")
        for method in ("increment", "svd")
        for modules in ('["q","k"]', '["v"]')
    ]
    assert list(settings.sweeps([])) == [()]


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ("rounds.num_round=1,2", "unknown key in .rounds. 'num_round'.*num_rounds"),
        ("round.num_rounds=1", "unknown section 'round'.*rounds"),
        ("simulation.partition.alfa=1", r"unknown key in \[simulation\.partition\] 'alfa'.*alpha"),
        ("simulation.seed.x=1", "unknown key in"),
        ("rounds.num_rounds", "takes section.key=a,b,c"),
        ("rounds.num_rounds=", "takes section.key=a,b,c"),
    ],
)
def test_an_unknown_sweep_key_is_an_error_that_lists_the_known_ones(sweep: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        list(settings.sweeps([sweep]))


def test_a_key_is_swept_once() -> None:
    with pytest.raises(ConfigError, match="twice"):
        list(settings.sweeps(["rounds.num_rounds=1", "rounds.num_rounds=2"]))


def test_every_run_of_a_sweep_is_checked_before_the_first_begins(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(FILE)
    with pytest.raises(ConfigError, match="oops"):
        running.planned(path, [], ["aggregator.method=increment,oops"], tmp_path / "out")
    with pytest.raises(ConfigError, match="unexpected keyword argument 'tale'"):
        running.planned(path, [], ["aggregator.tale=1,2"], tmp_path / "out")
    runs = running.planned(path, [], ["rounds.num_rounds=1,2", "simulation.seed=5"], tmp_path / "out")
    assert [run.config.rounds.num_rounds for run in runs] == [1, 2]
    assert len({run.folder for run in runs}) == 2
