"""The three protocols on runs whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError
from simulation.report import protocols
from simulation.report.protocols import Chosen, Judged
from simulation.report.story import told
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


def test_budgets_that_are_named_are_the_only_ones() -> None:
    asked = protocols.questions([], ["hours=2.5", "joules = 1e5", "hours=0.9", "hours=2.5"])
    assert asked.budgets == {"hours": [0.9, 2.5], "joules": [1e5]}
    rows = protocols.quality([run("a")], asked.budgets)
    assert [(row.cost, row.budget) for row in rows] == [("hours", 0.9), ("hours", 2.5), ("joules", 1e5)]


@pytest.mark.parametrize(
    "budget", ["hours", "hours=", "hours=two", "hours=-1", "mib=0", "joules=nan", "joules=inf", "watts=3"]
)
def test_a_budget_that_is_none_is_refused_with_what_is_expected(budget: str) -> None:
    with pytest.raises(ConfigError, match=rf"hours=NUMBER, mib=NUMBER, joules=NUMBER.*found '{budget}'"):
        protocols.questions([], [budget])


@pytest.mark.parametrize("target", [0.0, -0.3, float("nan"), float("inf")])
def test_a_target_that_no_loss_can_be_is_refused(target: float) -> None:
    with pytest.raises(ConfigError, match="--target takes a loss above 0"):
        protocols.questions([target], [])


def test_quality_has_the_accuracy_where_it_is_known() -> None:
    lines = [{**logs.version(number, None), "accuracy": number / 10} for number in (1, 2)]
    story = told(map(json.dumps, [logs.fleet(), *lines]), "a log")
    rows = protocols.quality([Judged({}, story, "real")], {"hours": [0.5, 1.5]})
    assert [row.accuracy for row in rows] == [None, 0.1]


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
