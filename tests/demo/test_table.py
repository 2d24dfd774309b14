"""The demo's tables and lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import pytest
from rich.console import Console
from rich.table import Table

from edge_runtime.demo import table
from edge_runtime.demo.board import Row, fold
from edge_runtime.demo.limits import Limit
from edge_runtime.wire.messages import Losses, Message, Report
from tests.demo.fleet import board_of, life
from tests.runtime import said

LIVES: Mapping[str, list[Message]] = {
    "never-came": [],
    "only-online": life("only-online")[:1],
    "planned": life("planned", rank=1, layers=2)[:2],
    "training": life("training")[:3],
    "without-hello": [said.report("without-hello", "failed", detail="no data")],
    "done": life("done"),
}
LIMITS = {name: Limit(800 << 20, None, "declared only") for name in LIVES}


def shown(found: Table, width: int) -> list[str]:
    """The lines of a table on a terminal of that width."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(found)
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("draw", [table.live, table.final])
@pytest.mark.parametrize("steps", range(1, 8))
def test_tables_can_be_drawn_at_any_moment_of_a_fleet_and_fit_the_terminal(width: int, draw, steps: int) -> None:
    board = board_of({name: messages[:steps] for name, messages in LIVES.items()})
    lines = shown(draw(board, LIMITS), width)

    assert lines
    assert max(map(len, lines)) <= width


def test_the_live_table_has_a_row_for_every_device_whether_it_came_or_not() -> None:
    text = "\n".join(shown(table.live(board_of(LIVES), LIMITS), 200))

    assert all(name in text for name in LIVES)
    assert "starting" in text
    assert "800.0 MiB" in text


def test_the_final_table_shows_losses_and_how_far_they_fell() -> None:
    text = "\n".join(shown(table.final(board_of({"done": life("done")}), {"done": LIMITS["done"]}), 200))

    assert "3.000 (-25%)" in text
    assert "1.000 (-75%)" in text
    assert "500 of 800 MiB" in text
    assert "1.0e-06" in text


def test_what_a_device_never_measured_is_a_dash_in_the_final_table() -> None:
    text = "\n".join(shown(table.final(board_of(LIVES), LIMITS), 200))

    assert "without-hello" in text
    assert "—" in text
    assert "never-came" not in text


def test_a_device_that_went_away_before_its_end_is_shown_as_offline() -> None:
    gone = [*life("pi")[:3], life("pi")[-1]]
    limits = {"pi": LIMITS["done"]}

    assert "offline" in "\n".join(shown(table.live(board_of({"pi": gone}), limits), 200))
    assert "offline" not in "\n".join(shown(table.live(board_of({"pi": life("pi")}), limits), 200))


@pytest.mark.parametrize(
    ("phase", "words"), [("gather", "joining"), ("train", "round 1 of 3"), ("finish", "personal adapters")]
)
def test_the_title_says_where_the_fleet_stands(phase: str, words: str) -> None:
    board = fold(board_of(LIVES), said.directive(phase))

    assert words in str(table.live(board, LIMITS).title)


def test_every_state_that_a_device_may_report_has_words() -> None:
    assert set(table.STATES) == set(get_args(Report.model_fields["state"].annotation))


def test_a_line_says_state_losses_and_detail() -> None:
    losses = Losses(base=4.0, merged=3.0, version=2, personal=1.0)
    row = board_of({"pi": [said.report("pi", "failed", held_out=losses, detail="no space left")]}).rows["pi"]

    assert table.line(row) == "pi: failed, round 1 [base 4.000, v2 3.000, personal 1.000] — no space left"
    assert table.line(Row("pi")) == "pi: online"
    assert table.line(Row("pi", online=False)) == "pi: offline"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (1 << 20, "1.0 MiB"), (3 << 30, "3.00 GiB")],
)
def test_sizes_are_told_in_binary_units(count: int, text: str) -> None:
    assert table.size(count) == text


def test_a_plan_says_how_many_of_the_layers_it_trains() -> None:
    board = board_of({"all": life("all"), "some": life("some", rank=1, layers=2)})

    assert table.plan(board.rows["all"]) == "rank 2 (holds 4), all layers, nf4"
    assert table.plan(board.rows["some"]) == "rank 1 (holds 2), last 2 of 3, nf4"
    assert table.plan(Row("pi")) == "…"
