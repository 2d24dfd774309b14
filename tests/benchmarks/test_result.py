"""The last line of a benchmark."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks.result import result


@pytest.mark.parametrize(
    ("value", "goal", "met"),
    [
        (0.1, ("<=", 0.1), True),
        (0.2, ("<=", 0.1), False),
        (0, ("==", 0), True),
        (math.nan, (">=", 0.0), False),
        (None, (">=", 0.0), False),
    ],
)
def test_a_goal_is_met_by_a_figure_that_is_there_and_within(
    value: float | None, goal: tuple[str, float], met: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert result("name", {"figure": value, "other": 1}, {"figure": goal}) is met

    said = json.loads(capsys.readouterr().out.removeprefix("RESULT "))
    assert said["name"] == "name"
    assert said["figures"]["other"] == 1
    assert said["goals"] == {"figure": list(goal)}
    assert said["met"] is met


def test_a_goal_for_a_figure_that_was_not_found_is_missed() -> None:
    assert not result("name", {}, {"figure": (">=", 0.0)})
