"""The files of a report: complete, alike each time, and needing nothing but themselves."""

from __future__ import annotations

import csv
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from edge_runtime.cli import simulate
from edge_runtime.errors import DataError, MissingExtraError
from simulation.report import page, writing
from simulation.report.page import Picture, Section
from simulation.report.protocols import Cost, Questions
from tests.simulation.fleets import asked
from tests.simulation.report import logs

VOID = {"meta", "img"}


class Checked(HTMLParser):
    """Remembers what is open, and everything that would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.images += tag == "img"
        if tag in {"script", "link", "iframe", "object"}:
            self.wrong.append(tag)
        for name, value in attrs:
            if name in {"src", "href"} and not (value or "").startswith("data:image/png;base64,"):
                self.wrong.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"/{tag}")


def checked(html: str) -> Checked:
    parser = Checked()
    parser.feed(html)
    parser.close()
    assert parser.wrong == []
    assert parser.open == []
    assert not re.search(r"url\(|@import|https?://", html)
    return parser


def test_a_page_is_well_formed_and_says_what_is_given_even_if_it_looks_like_markup() -> None:
    rows = [Cost("a<b>&", 0.5, None, 2.0, 1e6)]
    html = page.page(
        "<run>", "x & y", {"a": "<"}, [Picture("p", b"png", '"', "<c>")], [Section("t", "u", rows, "never")]
    )
    assert checked(html).images == 1
    assert "a&lt;b&gt;&amp;" in html
    assert "<td>0.5</td><td>never</td><td>2</td><td>1,000,000</td>" in html
    assert "prefers-color-scheme: dark" in html


def test_a_run_has_its_tables_its_pictures_and_one_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = writing.of_folder(logs.write(tmp_path), Questions([0.5]))
    assert written.drawn
    assert {path.name for path in tmp_path.iterdir()} == {
        "events.jsonl", "report.json", "report.html", "figures", "quality_under_budget.csv", "cost_to_target.csv",
    }  # fmt: skip
    figures = sorted((tmp_path / "figures").iterdir())
    assert [path.stem for path in figures] == [
        "effort", "loss", "partition", "plans", "stragglers", "time", "timeline", "truncation"
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures)
    assert checked((tmp_path / "report.html").read_text(encoding="utf-8")).images == len(figures)
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["cost_to_target"] == [{"run": "run", "target": 0.5, "hours": 2.0, "mib": 6.0, "joules": 200.0}]
    before = {path: path.read_bytes() for path in written.files}
    writing.of_folder(tmp_path, Questions([0.5]))
    assert {path: path.read_bytes() for path in written.files} == before


def test_folders_of_runs_are_a_sweep(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    logs.write(tmp_path / "calm")
    logs.write(tmp_path / "rough", (0.8, 0.7), "dropout")
    writing.of_folder(tmp_path)
    with (tmp_path / "robustness.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["run"], row["against"], row["dropouts"], row["loss"]) == ("rough", "calm", "1", "0.7")
    assert checked((tmp_path / "report.html").read_text(encoding="utf-8")).images == 2
    assert (tmp_path / "rough" / "report.html").exists()


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found neither"):
        writing.of_folder(tmp_path)


def test_without_matplotlib_the_tables_are_written_and_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    logs.write(tmp_path)
    with pytest.raises(MissingExtraError, match=r"edge-runtime\[simulate\]"):
        simulate.report(tmp_path, Questions(), json=False)
    assert (tmp_path / "cost_to_target.csv").exists()
    assert not (tmp_path / "report.html").exists()
    file = tmp_path / "fleet.toml"
    file.write_text("")
    assert simulate.run(file, [], tmp_path / "out", asked(), json=True, drawn=True) == 0
    assert (tmp_path / "out" / "report.json").exists()


def test_a_swept_fleet_shows_what_crashes_cost(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, out = tmp_path / "fleet.toml", tmp_path / "out"
    file.write_text("")
    calm, rough = (
        f'[{{device = "raspberry-pi-5", count = 3, name = "a-long-name-that-fills-the-name-of-a-folder", '
        f"straggler_sigma = 0.0, dropout_hours = 1.0, restart_seconds = 60.0, crashes_per_hour = {crashes}}}]"
        for crashes in (0.0, 200.0)
    )
    assert simulate.run(file, [f"simulation.devices={calm},{rough}"], out, asked(), json=True, drawn=True) == 0
    (row,) = json.loads((out / "report.json").read_text())["robustness"]
    assert (row["run"], row["against"]) == ("devices=no. 2", "devices=no. 1")
    assert row["crashes"] > 0
    assert row["hours"] > row["hours_without"]
    assert simulate.report(out, Questions(), json=True) == 0


def test_a_sweep_reports_itself_and_is_reported_again_from_its_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, out = tmp_path / "fleet.toml", tmp_path / "out"
    file.write_text("")
    assert simulate.run(file, ["aggregator.method=svd,zero_pad"], out, asked(), json=True, drawn=True) == 0
    first = (out / "report.json").read_bytes()
    assert [each["run"] for each in json.loads(first)["runs"]] == ["method=svd", "method=zero_pad"]
    assert simulate.report(out, Questions(), json=True) == 0
    assert (out / "report.json").read_bytes() == first
