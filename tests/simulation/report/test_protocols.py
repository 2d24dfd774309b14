"""The three protocols on runs whose answers are known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulation.report import protocols
from simulation.report.protocols import Chosen, Judged
from tests.simulation.report import logs


def run(
    name: str, losses: Sequence[float | None] = logs.LOSSES, *failures: str, chosen: Chosen | None = None
) -> Judged:
    return Judged(chosen or {}, logs.story(losses, *failures), name)


def test_quality_is_that_of_the_last_version_within_the_budget() -> None:
    rows = protocols.quality([run("a")], {"hours": [0.9, 1.0, 2.5], "mib": [6.0], "joules": [1e9]})
    assert [(row.cost, row.budget, row.loss) for row in rows] == [
        ("hours", 0.9, None), ("hours", 1.0, 0.8), ("hours", 2.5, 0.5), ("mib", 6.0, 0.5), ("joules", 1e9, 0.4),
    ]  # fmt: skip


def test_budgets_are_shares_of_what_the_most_frugal_run_spent() -> None:
    rows = protocols.quality([run("long"), run("short", (0.7, 0.6))])
    assert sorted({row.budget for row in rows if row.cost == "hours"}) == [0.5, 1.0, 2.0]
    assert [row.loss for row in rows if row.cost == "hours" and row.budget == 2.0] == [0.5, 0.6]


def test_a_cost_is_what_was_spent_when_the_target_was_reached_or_never() -> None:
    at, never = protocols.cost([run("a")], [0.5, 0.39])
    assert (at.hours, at.mib, at.joules) == (2.0, 6.0, 200.0)
    assert (never.hours, never.mib, never.joules) == (None, None, None)


def test_the_devices_loss_stands_in_where_the_global_one_is_not_known() -> None:
    assert protocols.cost([run("real", (None, None))], [0.9])[0].hours == 1.0


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=5))
def test_chosen_targets_are_reached_by_some_run(losses: list[float]) -> None:
    rows = protocols.cost([run("a", losses)])
    assert len(rows) == 3
    assert all(row.hours is not None for row in rows)


def test_a_run_with_failures_is_set_beside_one_that_fails_less_and_is_alike_otherwise() -> None:
    key, method = "simulation.server_crashes_per_hour", "aggregator.method"
    runs = [
        run("calm svd", chosen={key: "0", method: "svd"}),
        run("rough svd", (0.8, 0.6), "crash", "server crash", chosen={key: "1", method: "svd"}),
        run("calm pad", (0.9,), chosen={key: "0", method: "zero_pad"}),
    ]
    (row,) = protocols.robustness(runs)
    assert (row.run, row.against) == ("rough svd", "calm svd")
    assert (row.crashes, row.dropouts, row.server_crashes) == (1, 0, 1)
    assert (row.loss, row.loss_without) == (0.6, 0.4)
    assert (row.rounds, row.rounds_without, row.hours, row.hours_without) == (2, 3, 2.0, 3.0)


def test_runs_that_merged_nothing_have_no_quality_and_no_cost() -> None:
    assert protocols.quality([run("none", ())]) == []
    assert protocols.cost([run("none", ())]) == []
    assert [row.hours for row in protocols.cost([run("none", ())], [0.5])] == [None]


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ([{}], ["run"]),
        ([{"a.b": "1"}, {"a.b": "2"}], ["b=1", "b=2"]),
        ([{"run": "calm"}], ["calm"]),
        ([{"a.b": "x" * 99}, {"a.b": "y" * 99}], ["b=no. 1", "b=no. 2"]),
    ],
)
def test_runs_have_names_that_fit_a_legend(chosen: list[dict[str, str]], names: list[str]) -> None:
    assert protocols.named(chosen) == names
