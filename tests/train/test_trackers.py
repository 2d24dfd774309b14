"""Trackers: what is logged is found again, and nothing is asked of the network."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.errors import ConfigError, DataError, MissingExtraError
from edge_runtime.train import trackers
from edge_runtime.train.trackers import KINDS, RECORDS, open_tracker

CONFIG = {"learning_rate": 2e-4, "lora": {"r": 8, "target_modules": ["q_proj", "v_proj"]}, "packed": True}


def records(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / RECORDS).read_text(encoding="utf-8").splitlines()]


def test_the_file_has_one_json_object_for_each_step(tmp_path: Path) -> None:
    tracker = open_tracker("jsonl", "mine", CONFIG, tmp_path / "runs")
    tracker.log({"loss": 2.5, "where": "Zürich"}, 1)
    tracker.log({"loss": 1.25}, 2)
    tracker.close()

    assert records(tmp_path / "runs") == [
        {
            "project": "mine",
            "config": {
                "learning_rate": 2e-4,
                "lora.r": 8,
                "lora.target_modules": "['q_proj', 'v_proj']",
                "packed": True,
            },
        },
        {"step": 1, "loss": 2.5, "where": "Zürich"},
        {"step": 2, "loss": 1.25},
    ]


def test_each_line_is_there_before_the_run_ends(tmp_path: Path) -> None:
    """A device that is switched off loses nothing that it had logged."""
    tracker = open_tracker("jsonl", "mine", {}, tmp_path)
    tracker.log({"loss": 2.5}, 1)
    found = records(tmp_path)
    tracker.close()

    assert found[-1] == {"step": 1, "loss": 2.5}


def test_a_run_that_goes_on_keeps_what_it_had_and_mends_a_cut_line(tmp_path: Path) -> None:
    first = open_tracker("jsonl", "mine", {}, tmp_path)
    first.log({"loss": 2.5}, 1)
    first.close()
    with (tmp_path / RECORDS).open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')
    second = open_tracker("jsonl", "mine", {}, tmp_path)
    second.log({"loss": 1.5}, 2)
    second.close()
    lines = (tmp_path / RECORDS).read_text(encoding="utf-8").splitlines()

    assert len(lines) == 5
    assert json.loads(lines[1]) == {"step": 1, "loss": 2.5}
    assert json.loads(lines[4]) == {"step": 2, "loss": 1.5}


def test_numbers_that_json_lacks_are_still_json(tmp_path: Path) -> None:
    tracker = open_tracker("jsonl", "mine", {"limit": math.inf}, tmp_path)
    tracker.log({"loss": math.nan, "least": -math.inf}, 1)
    tracker.close()
    config, step = records(tmp_path)

    assert config["config"] == {"limit": "inf"}
    assert math.isnan(float(str(step["loss"])))
    assert float(str(step["least"])) == -math.inf


def test_none_writes_nothing(tmp_path: Path) -> None:
    tracker = open_tracker("none", "mine", CONFIG, tmp_path / "runs")
    tracker.log({"loss": 1.0}, 1)
    tracker.close()

    assert tracker.names == ()
    assert not (tmp_path / "runs").exists()


def test_all_are_the_file_and_whatever_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_is_installed", lambda _: False)
    tracker = open_tracker("all", "mine", CONFIG, tmp_path)
    tracker.close()

    assert tracker.names == ("jsonl",)


def test_several_are_named_once_each(tmp_path: Path) -> None:
    tracker = open_tracker(["jsonl", "jsonl"], "mine", {}, tmp_path)
    tracker.close()

    assert tracker.names == ("jsonl",)
    assert len(records(tmp_path)) == 1


@pytest.mark.parametrize("asked", ["tensorbored", ["jsonl", "clearml"]])
def test_an_unknown_tracker_is_an_error_that_lists_the_known_ones(asked: str | list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"aim.*jsonl.*tensorboard.*wandb"):
        open_tracker(asked, "mine", {}, tmp_path)


def test_contradictions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="drop 'none'"):
        open_tracker(["none", "jsonl"], "mine", {}, tmp_path)
    with pytest.raises(ConfigError, match="wandd"):
        open_tracker("jsonl", "mine", {}, tmp_path, options={"wandd": {}})
    with pytest.raises(DataError, match=r"a\.b twice"):
        open_tracker("jsonl", "mine", {"a.b": 1, "a": {"b": 2}}, tmp_path)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_tracker_whose_library_is_missing_names_the_package(name: str, tmp_path: Path) -> None:
    if trackers._is_installed(name):
        pytest.skip(f"{name} is installed here")

    with pytest.raises(MissingExtraError, match=f"pip install {KINDS[name].packages[0]}"):
        open_tracker(["jsonl", name], "mine", {}, tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file", encoding="utf-8")

    with pytest.raises(DataError, match="runs"):
        open_tracker("jsonl", "mine", {}, tmp_path / "runs")


@pytest.mark.torch
def test_our_table_is_that_of_accelerate() -> None:
    """All but clearml, which cannot be opened offline by its arguments."""
    tracking = pytest.importorskip("accelerate.tracking")

    assert set(KINDS) | {"clearml"} == set(tracking.LOGGER_TYPE_TO_CLASS)


@pytest.mark.torch
def test_tensorboard_gets_every_value(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    tracker = open_tracker(["tensorboard", "jsonl"], "mine", CONFIG, tmp_path)
    for step, loss in enumerate((2.5, 1.25), start=1):
        tracker.log({"loss": loss, "note": "fine"}, step)
    tracker.close()
    found = reader.EventAccumulator(str(tmp_path / "mine"))
    found.Reload()

    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 2.5), (2, 1.25)]
    assert [record["loss"] for record in records(tmp_path)[1:]] == [2.5, 1.25]


def test_the_file_needs_no_library_of_training() -> None:
    code = (
        "import sys, tempfile, pathlib; from edge_runtime.train.trackers import open_tracker;"
        "open_tracker('jsonl', 'mine', {}, pathlib.Path(tempfile.mkdtemp())).close();"
        "sys.exit(bool({'torch', 'accelerate'} & set(sys.modules)))"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
