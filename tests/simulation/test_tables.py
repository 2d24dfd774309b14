"""A run's tables: CSV always, Parquet where pyarrow is."""

from __future__ import annotations

import csv
import importlib.util
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType

import pytest

from simulation import tables
from simulation.tables import VersionRow

ROWS = [
    VersionRow(1, 1, 60.0, 0.5, 0.1, None, 4, 0.01, 10.0, 20.0, 30.0),
    VersionRow(2, 2, 90.5, None, None, 1.25, 3, 0.0, 15.0, 40.0, 60.0, accuracy=0.5),
]


def test_a_row_is_a_line_and_what_is_unknown_is_empty(tmp_path: Path) -> None:
    files = tables.write(tmp_path, "rounds", ROWS)
    with files[0].open(newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == [entry.name for entry in fields(VersionRow)]
    assert [(row["loss"], row["held_out"], row["accuracy"]) for row in found] == [("0.5", "", ""), ("", "1.25", "0.5")]


def test_without_pyarrow_there_is_no_parquet_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "find_spec", lambda _: None)
    assert [path.name for path in tables.write(tmp_path, "rounds", ROWS)] == ["rounds.csv"]
    assert [path.name for path in tmp_path.iterdir()] == ["rounds.csv"]


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow belongs to no extra")
def test_parquet_has_the_same_rows(tmp_path: Path) -> None:
    parquet: ModuleType = importlib.import_module("pyarrow.parquet")
    _, file = tables.write(tmp_path, "rounds", ROWS)
    assert file.name == "rounds.parquet"
    assert parquet.read_table(file).to_pylist() == [asdict(row) for row in ROWS]
