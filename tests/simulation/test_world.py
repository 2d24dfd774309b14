from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import config as fleets
from edge_runtime.errors import ConfigError, PlanError
from edge_runtime.train.planning import Owner, choose
from profiles import catalogue
from profiles.find_card import find_card
from profiles.machine import with_reserve
from server import aggregators
from server.exchange import rank_of
from server.fitting import spec_of
from server.store import Store
from simulation import people, tables
from simulation.world import Outcome
from tests.simulation.fleets import THREE, asked, events, run, world

WILD = (
    '[{device = "raspberry-pi-5", count = 3, name = "pi", straggler_sigma = 0.5, crashes_per_hour = 40, dropout = 0.5,'
    ' dropout_hours = 0.02, restart_seconds = 5, link = {loss = 0.01, latency_ms = 30}, site = "barn"},'
    ' {device = "jetson-nano", count = 3, name = "nano", battery = {capacity_wh = 0.5, level = 60,'
    ' plugged = {kind = "exponential", on_hours = 0.1, off_hours = 0.1}},'
    ' availability = {kind = "exponential", on_hours = 0.3, off_hours = 0.05}}]'
)
SITES = "simulation.sites={barn = {up_mbit_s = 2, down_mbit_s = 20}}"


def logged(folder: Path, event: str) -> list[dict[str, Any]]:
    found = (json.loads(line) for line in events(folder).splitlines())
    return [line for line in found if line["event"] == event]


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path: Path) -> None:
    """With all that chance decides: stragglers, crashes, absences, batteries, drop-outs and a crashing server."""
    wild = (SITES, "simulation.server_crashes_per_hour=20", "rounds.num_rounds=3")
    first, again = (run(tmp_path / name, *wild, devices=WILD, least=4) for name in ("first", "again"))
    assert events(tmp_path / "first") == events(tmp_path / "again")
    assert first == again
    other = run(tmp_path / "other", *wild, "simulation.seed=1", devices=WILD, least=4)
    assert events(tmp_path / "first") != events(tmp_path / "other")
    assert first.adapter != other.adapter
    kinds = Counter(line["event"] for line in map(json.loads, events(tmp_path / "first").splitlines()))
    assert min(kinds[kind] for kind in ("crash", "server crash", "span", "update", "version")) > 0
    assert {line["kind"] for line in logged(tmp_path / "first", "span")} >= {"computing", "sending", "away", "paused"}


def test_the_surrogate_is_learnt(tmp_path: Path) -> None:
    found = run(tmp_path, "rounds.num_rounds=8", "training.max_steps=20", "training.learning_rate=1e-2")
    over = [row.loss - row.floor for row in found.versions if row.loss is not None and row.floor is not None]
    assert found.finished
    assert over[3] < over[1] < over[0]
    assert 0 <= over[-1] < 0.2 * over[0]


def linked(rate: float) -> str:
    return f'[{{device = "raspberry-pi-5", count = 2, name = "pi", link = {{up_mbit_s = {rate}, latency_ms = 0}}}}]'


def test_on_a_link_of_half_the_rate_uploads_take_twice_as_long(tmp_path: Path) -> None:
    times = {
        rate: sum(row.sending for row in run(tmp_path / str(rate), devices=linked(rate), least=2).devices)
        for rate in (1.0, 0.5)
    }
    assert times[0.5] == pytest.approx(2 * times[1.0], rel=1e-6)


def test_bytes_are_those_of_the_base_model(tmp_path: Path) -> None:
    """A surrogate of half the numbers moves as much, but for headers."""
    moved = [
        run(tmp_path / str(width), f"simulation.surrogate={{layers = 2, width = {width}}}", "wire.codec_up=fp32")
        for width in (64, 128)
    ]
    first, second = (found.versions[-1].bytes_up for found in moved)
    assert first == pytest.approx(second, rel=0.1)


def test_a_simulated_device_makes_the_plan_that_the_device_would_make(tmp_path: Path) -> None:
    devices = '[{device = "jetson-nano", name = "nano"}, {device = "raspberry-pi-4", memory_limit = 700000000}]'
    run(tmp_path, devices=devices, least=2)
    config = fleets.load(None, [text for text in asked(devices=devices, least=2) if "simulation" not in text])
    method, card = aggregators.build("increment"), find_card("SmolLM2-135M")
    spec, training = spec_of(config, method, rank_of(config, method)), people.training_of(config)
    expected = choose(catalogue.device("jetson-nano"), card, spec, training, Owner(), None)
    ceiling = with_reserve(700_000_000, "").value
    limited = choose(catalogue.device("raspberry-pi-4"), card, spec, training, Owner(), ceiling)
    plans = {line["group"]: line for line in logged(tmp_path, "device")}
    for name, plan in (("nano", expected), ("raspberry-pi-4", limited)):
        found = plans[name]
        assert (found["rank"], found["held"], found["precision"]) == (plan.rank, plan.held, plan.precision)
    spans = [span for span in logged(tmp_path, "span") if (span["device"], span["kind"]) == ("nano-0", "computing")]
    steps = config.training.max_steps + config.device.eval_examples / config.training.batch_size / 3
    assert spans[0]["to"] - spans[0]["from"] == pytest.approx(steps * (expected.predicted_step_seconds or 0))


def test_an_impossible_fleet_is_refused_and_its_devices_are_named(tmp_path: Path) -> None:
    devices = (
        '[{device = "raspberry-pi-5", name = "good"}, {device = "jetson-nano", name = "small", count = 7},'
        ' {device = "raspberry-pi-4", name = "tiny", memory_limit = 50000000}]'
    )
    with pytest.raises(
        PlanError, match=r"(?s)impossible.*'small' \(7 x jetson-nano\).*'tiny' \(1 x raspberry-pi-4\)"
    ) as found:
        world(tmp_path, "simulation.base=Qwen2.5-7B", devices=devices.replace("raspberry-pi-5", "desktop-gpu"))
    assert "'good'" not in str(found.value)


def test_nobody_is_left_to_wait_for_ends_a_run_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("device,from,to\npi-0,0,0.01\npi-1,0,0.01\n")
    devices = (
        f'[{{device = "raspberry-pi-5", count = 2, name = "pi", availability = {{kind = "file", file = "{path}"}}}}]'
    )
    found = run(tmp_path / "out", "training.max_steps=50", devices=devices, least=2)
    assert not found.finished
    assert "nothing will happen any more" in found.why
    assert logged(tmp_path / "out", "end")[0]["finished"] is False


def test_a_server_that_crashes_again_and_again_does_not_hide_that_nothing_will_happen(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("device,from,to\npi-0,0,0.01\n")
    devices = f'[{{device = "raspberry-pi-5", name = "pi", availability = {{kind = "file", file = "{path}"}}}}]'
    settings = ("training.max_steps=50", "simulation.server_crashes_per_hour=2")
    found = run(tmp_path / "out", *settings, devices=devices, least=1)
    assert "nothing will happen any more" in found.why
    assert found.seconds < 24 * 3600


def test_a_fleet_that_would_never_begin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"min_available_nodes waits for 9 devices, and \[simulation\] has 3"):
        world(tmp_path, least=9)


def test_a_run_is_given_up_after_its_time(tmp_path: Path) -> None:
    found = run(tmp_path, "simulation.max_hours=0.001")
    assert not found.finished
    assert "of virtual time are over" in found.why


def test_devices_make_their_personal_adapters_where_that_is_asked_for(tmp_path: Path) -> None:
    found = run(tmp_path, "simulation.finish=true")
    assert all(row.personal is not None for row in found.devices)
    assert len(logged(tmp_path, "personal")) == 3


@pytest.mark.parametrize(
    "settings",
    [
        ("rounds.mode=buffered", "rounds.buffer_size=2", "rounds.num_rounds=4"),
        ("aggregator.method=svd", "wire.codec_up=fp32"),
        ("aggregator.method=fedit",),
        ("aggregator.method=fedsa_lora",),
        ("adapter.slice=personal", "adapter.allocation=spectrum"),
        ("wire.codec_up=auto", "wire.chunk_bytes=1024"),
        ("rounds.fraction_train=0.5", "rounds.over_select=1.5"),
    ],
    ids=lambda settings: settings[0],
)
def test_what_real_fleets_may_set_simulated_ones_may_as_well(tmp_path: Path, settings: tuple[str, ...]) -> None:
    found = run(tmp_path, *settings)
    assert found.finished, found.why
    assert found.versions[-1].loss is not None


def test_times_of_a_device_add_up(tmp_path: Path) -> None:
    found = run(tmp_path, SITES, devices=WILD, least=4)
    kinds = ("computing", "paused", "sending", "receiving", "away")
    spans = logged(tmp_path, "span")
    for row in found.devices:
        for kind in kinds:
            told = sum(s["to"] - s["from"] for s in spans if (s["device"], s["kind"]) == (row.device, kind))
            assert getattr(row, kind) == pytest.approx(told)
        mine = sorted((s["from"], s["to"]) for s in spans if s["device"] == row.device)
        assert all(end <= begin + 1e-6 for (_, end), (begin, _) in itertools.pairwise(mine)), row.device
        assert sum(getattr(row, kind) for kind in kinds) + row.waiting == pytest.approx(found.seconds)


def test_tables_have_a_row_for_each_version_and_each_device(tmp_path: Path) -> None:
    found = run(tmp_path)
    with (tmp_path / "spans.csv").open(newline="") as file:
        spans = list(csv.DictReader(file))
    assert [(row["device"], float(row["to"])) for row in spans] == [
        (line["device"], line["to"]) for line in logged(tmp_path, "span")
    ]
    for name, rows in (("rounds", found.versions), ("devices", found.devices)):
        (path, *_) = tables.write(tmp_path, name, rows)
        with path.open(newline="") as file:
            read = list(csv.DictReader(file))
        assert len(read) == len(rows)
        assert float(read[-1]["joules"]) == rows[-1].joules


class TestCrashes:
    """A crash costs time and changes no result: what is trained is a function of what was received."""

    SETTINGS = ("wire.chunk_bytes=1024", "simulation.finish=true")
    DEVICES = THREE.replace("}", ", restart_seconds = 0.5}")

    @pytest.fixture(scope="class")
    @classmethod
    def calm(cls, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
        return run(tmp_path_factory.mktemp("calm"), *cls.SETTINGS, devices=cls.DEVICES)

    @pytest.mark.parametrize("victim", ["server", "pi-0", "orin-0"])
    def test_whoever_crashes_at_any_event_the_versions_are_the_same(
        self, tmp_path: Path, calm: Outcome, victim: str
    ) -> None:
        number = 3
        while number < calm.events:
            found = run(tmp_path / str(number), *self.SETTINGS, devices=self.DEVICES, kills={number: victim})
            assert found.finished, (number, found.why)
            assert found.adapter == calm.adapter, number
            assert [row.updates for row in found.versions] == [3, 3]
            number += max(1, calm.events // 25)

    def test_all_may_crash_again_and_again(self, tmp_path: Path, calm: Outcome) -> None:
        kills = {number: ("server", "pi-0", "pi-1", "orin-0")[number // 7 % 4] for number in range(5, 300, 7)}
        found = run(tmp_path, *self.SETTINGS, devices=self.DEVICES, kills=kills)
        assert found.finished, found.why
        assert found.adapter == calm.adapter
        assert sum(row.crashes for row in found.devices) > 3


def test_a_run_that_was_stopped_goes_on_from_what_was_computed_to_the_same_bytes(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "rounds.num_rounds=4")
    left = iter(range(whole.events))

    def stop() -> bool:
        return next(left) >= whole.events // 2

    with pytest.raises(KeyboardInterrupt):
        world(tmp_path / "parts", "rounds.num_rounds=4").run(stop=stop)
    resumed = run(tmp_path / "parts", "rounds.num_rounds=4")
    assert 0 < resumed.found < 12
    assert events(tmp_path / "parts") == events(tmp_path / "whole")
    assert (resumed.adapter, resumed.versions, resumed.devices) == (whole.adapter, whole.versions, whole.devices)
    # Of another simulation in the same folder nothing is taken.
    other = run(tmp_path / "parts", "rounds.num_rounds=4", "simulation.seed=7")
    assert other.found == 0


def test_a_server_reads_what_is_usual_again_when_a_tenth_more_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    norms = Store.norms

    def counted(store: Store, number: int, *, before: int = 1) -> list[float]:
        reads.append(number)
        return norms(store, number, before=before)

    monkeypatch.setattr(Store, "norms", counted)
    devices = '[{device = "raspberry-pi-5", count = 60, name = "pi"}]'
    assert run(tmp_path, "rounds.num_rounds=1", devices=devices, least=60).versions[0].updates == 60
    assert 20 <= len(reads) <= 40


def test_a_device_hears_only_what_concerns_it(tmp_path: Path) -> None:
    """Of a large fleet, a round costs what its participants cost."""
    few = run(tmp_path / "few", "rounds.fraction_train=0.5", devices=THREE.replace("count = 2", "count = 9"), least=10)
    many = run(
        tmp_path / "many", "rounds.fraction_train=0.05", devices=THREE.replace("count = 2", "count = 99"), least=100
    )
    assert [row.updates for row in few.versions] == [row.updates for row in many.versions] == [5, 5]
    assert many.events - few.events < 90 * 10
