"""The verb, from its arguments to its files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.cli import shell, simulate
from edge_runtime.errors import INTERRUPTED, ConfigError, RoundError
from tests.simulation.fleets import asked


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.toml"
    path.write_text("")
    return path


def run(file: Path, *sweep: str, json: bool = True, overrides: tuple[str, ...] = ()) -> int:
    return simulate.run(file, sweep, file.parent / "out", asked(*overrides), json=json)


def test_a_run_says_what_it_came_to_and_leaves_its_tables(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(file) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["finished"]
    assert len(told["versions"]) == told["rounds"] == 2
    out = file.parent / "out"
    assert {"rounds.csv", "devices.csv", "events.jsonl"} <= {path.name for path in out.iterdir()}
    assert run(file, json=False) == 0
    assert "2 x pi" in capsys.readouterr().out


def test_a_sweep_has_a_folder_for_each_run_and_a_table_of_all(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(file, "aggregator.method=increment,svd", "simulation.seed=0,1") == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["run"][0] for each in told] == [
        f"aggregator.method={name}" for name in ("increment",) * 2 + ("svd",) * 2
    ]
    assert len({each["adapter"] for each in told}) == 4
    with (file.parent / "out" / "sweep.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [(row["aggregator.method"], row["simulation.seed"]) for row in rows] == [
        ("increment", "0"), ("increment", "1"), ("svd", "0"), ("svd", "1"),
    ]  # fmt: skip
    assert [row["adapter"] for row in rows] == [each["adapter"] for each in told]
    assert all((Path(each["folder"]) / "rounds.csv").exists() for each in told)


def test_a_fleet_that_does_not_finish_is_told_by_the_exit_code(file: Path) -> None:
    assert run(file, overrides=("simulation.max_hours=0.001",)) == RoundError.exit_code


def test_an_unknown_sweep_key_begins_nothing(file: Path) -> None:
    with pytest.raises(ConfigError, match="expected one of: buffer_size"):
        run(file, "rounds.num_round=1,2")
    assert not (file.parent / "out").exists()


def test_ctrl_c_ends_a_run_that_goes_on_later(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "stop_on_signals", lambda: lambda: True)
    assert run(file) == INTERRUPTED
    monkeypatch.setattr(shell, "stop_on_signals", lambda: lambda: False)
    assert run(file) == 0
