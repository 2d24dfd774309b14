"""The fleets of examples/: each begins by the command that its first lines tell."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from simulation import people, running
from simulation.report import protocols

FLEETS = sorted((Path(__file__).parents[2] / "examples" / "simulation").glob("*.toml"))


@pytest.mark.parametrize("path", FLEETS, ids=lambda path: path.stem)
def test_the_command_in_a_file_plans_its_runs(path: Path, tmp_path: Path) -> None:
    found = re.search(r"^# +(edge-runtime simulate .*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    _, _, file, *options = shlex.split(found[1])
    assert Path(file).name == path.name
    asked = list(zip(options[::2], options[1::2], strict=True))
    protocols.questions([float(value) for name, value in asked if name == "--target"], [])
    sweep = [value for name, value in asked if name == "--sweep"]
    runs = running.planned(path, [], sweep, tmp_path)
    assert {name for name, _ in asked} <= {"--sweep", "--target"}
    assert len(runs) == (4 if "rank" in path.stem else 2 if sweep else 1)
    for run in runs:
        people.check(run.config, run.simulation)
