"""The benchmark of simulations: its figures are what they say, and a peer that is not there is said to be not there."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks import simulation, simulation_peer
from benchmarks.bases import random_base
from benchmarks.proportional import on_path, pss, watched
from benchmarks.simulation_flower import FACTORS, adapter_of, arrays_of, beginning
from benchmarks.simulation_peer import Ran, figures_of
from benchmarks.simulation_peer_runs import Toy
from benchmarks.simulation_real import Run, Watch, overhead
from edge_runtime.lora.adapter import Adapter, Pair
from simulation import settings

MIB = 2**20


def test_overhead_is_what_neither_trains_nor_reads_the_base() -> None:
    spent = {"training": 60.0, "evaluating": 30.0, "loading": 10.0}
    assert overhead(110.0, spent) == pytest.approx(0.1)
    assert overhead(100.0, spent) == 0.0


def test_a_watch_times_calls_and_leaves_things_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 3.0, 10.0, 14.5])
    monkeypatch.setattr("benchmarks.simulation_real.time.perf_counter", lambda: next(now))
    thing, watch = types.SimpleNamespace(double=lambda x: 2 * x), Watch()
    real = thing.double
    with watch.on("doubling", thing, "double"):
        assert (thing.double(2), thing.double(3)) == (4, 6)
    assert thing.double is real
    assert watch.seconds == {"doubling": 6.5}


def test_the_goal_holds_for_the_lower_of_both_speeds() -> None:
    ours = [Ran(10.0, 4.0, 90.0, 20.0, peak, 4, ()) for peak in (300.0, 900.0, 400.0)]
    theirs = [Ran(40.0, 9.0, 10.0, 5.0, 1000.0, 10, ())]
    found = figures_of({"ours": ours, "flower": theirs})
    assert found["flower_speed_ratio_steady"] == 9.0
    assert found["flower_speed_ratio_whole"] == found["flower_speed_ratio"] == 4.0
    assert found["flower_memory_ratio"] == 0.4, "the median counts"


def test_every_goal_belongs_to_a_part() -> None:
    assert sorted(simulation.GOALS) == sorted(goal for goals in simulation.PARTS.values() for goal in goals)


def test_without_flower_its_part_has_no_figures_and_says_how_to_get_it(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    assert simulation.flower(console, ["a.jsonl"], tmp_path, quick=True) == {}
    assert "not run" in (said := console.export_text())
    assert simulation_peer.HOW in said


@pytest.mark.parametrize("clients", [1, 3])
def test_both_fleets_are_files_that_the_simulator_takes(clients: int) -> None:
    toy = Toy("SmolLM2-135M", ["a.jsonl"], clients, rounds=2, steps=3)
    config, simulated = settings.load(None, toy.overrides)
    assert (config.rounds.num_rounds, simulated.workers, simulated.engine) == (2, 2, "processes")
    config, simulated = settings.load(None, Run(["a.jsonl"], clients, rounds=2, steps=3).overrides)
    assert (sum(group.count for group in simulated.devices), simulated.engine) == (clients, "inline")


def test_an_adapter_travels_as_named_arrays() -> None:
    draw = np.random.default_rng(0)
    layers = {
        name: Pair(draw.standard_normal((2, 5)).astype(np.float32), draw.standard_normal((3, 2)).astype(np.float32))
        for name in ("model.layers.0.q_proj", "model.layers.10.q_proj", "model.layers.2.q_proj")
    }
    adapter = Adapter(layers)
    arrays = arrays_of(adapter)
    assert set(arrays) == {f"{name}.{factor}" for name in layers for factor in FACTORS}
    assert adapter_of(dict(reversed(arrays.items()))).digest() == adapter.digest()


@pytest.mark.torch
def test_flower_begins_with_what_our_server_begins_with(tmp_path: Path) -> None:
    adapter = beginning(Toy(random_base("llama-toy", tmp_path), ["a.jsonl"], 1, rounds=1, steps=1, rank=4))
    assert set(adapter.ranks.values()) == {4}
    assert all(not pair.b.any() for pair in adapter.values())
    assert all(
        np.allclose(pair.a @ pair.a.T, pair.a[0] @ pair.a[0] * np.eye(4), atol=1e-5) for pair in adapter.values()
    )


def test_a_folder_of_packages_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", "else")
    assert on_path(tmp_path)["PYTHONPATH"].split(os.pathsep) == [str(tmp_path), "else"]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="needs Linux's /proc/PID/smaps_rollup")
class TestProportional:
    def test_memory_of_all_processes_is_summed_and_what_they_share_counts_once(self) -> None:
        code = (  # no block is made by copying another: a look at both would see twice as much in one process
            "import os, time\n"
            "held = bytearray(b'x') * (64 << 20)\n"
            "if os.fork() == 0:\n    more = bytearray(b'y') * (16 << 20); time.sleep(1.5); os._exit(0)\n"
            "own = bytearray(b'z') * (32 << 20); time.sleep(1.5); os.wait(); print('said')"
        )
        found = watched([sys.executable, "-c", code], os.environ)
        assert found.output == "said\n"
        assert found.processes == 2
        assert 112 * MIB < found.peak < 112 * MIB + 40 * MIB

    def test_what_a_command_leaves_behind_is_ended(self, tmp_path: Path) -> None:
        code = (
            "import subprocess, sys, time\n"
            "left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
            "open(sys.argv[1], 'w').write(str(left.pid)); time.sleep(1)"
        )
        watched([sys.executable, "-c", code, str(tmp_path / "pid")], os.environ)
        assert pss(int((tmp_path / "pid").read_text())) == 0

    def test_a_command_that_fails_says_why(self) -> None:
        with pytest.raises(SystemExit, match=r"ended with 3.*because"):
            watched([sys.executable, "-c", "import sys; print('because', file=sys.stderr); sys.exit(3)"], os.environ)

    def test_a_process_that_ended_has_no_memory(self) -> None:
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        assert pss(process.pid) == 0
