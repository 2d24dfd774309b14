"""The verdict on unfinished work, and how far a ceiling is lowered."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError
from edge_runtime.survival import STEP_DOWN, Kernel, Mark, lowered, verdict

THEN = Kernel(boot="one", machine_kills=3, group_kills=1, group="/group#7")
counts = st.none() | st.integers(0, 5)
kernels = st.builds(
    Kernel,
    boot=st.sampled_from(["", "one", "two"]),
    machine_kills=counts,
    group_kills=counts,
    group=st.sampled_from(["", "/group#7", "/group#8"]),
)


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (THEN, "other"),
        (replace(THEN, machine_kills=4, group_kills=2), "memory"),
        # Somebody else's process was killed, and our group's counter knows that it was not ours.
        (replace(THEN, machine_kills=4), "other"),
        # A service manager made the group anew: its counter began again, so the machine's decides.
        (replace(THEN, machine_kills=4, group_kills=0, group="/group#8"), "memory"),
        (replace(THEN, group_kills=0, group="/group#8"), "other"),
        (replace(THEN, machine_kills=4, group_kills=None, group=""), "memory"),
        (replace(THEN, machine_kills=None, group_kills=None, group=""), "memory"),
        (replace(THEN, boot="two", machine_kills=9, group_kills=9), "other"),
        (replace(THEN, boot="", machine_kills=9), "other"),
    ],
)
def test_a_verdict_follows_from_boot_and_counters(now: Kernel, expected: str) -> None:
    assert verdict(Mark("training", 10, THEN), now) == expected


def test_without_any_counter_a_process_that_vanished_is_taken_for_killed() -> None:
    assert verdict(Mark("training", 10, Kernel(boot="one")), Kernel(boot="one")) == "memory"


@given(kernels, kernels)
def test_another_boot_is_never_a_kill_and_growth_of_all_counters_always_is(then: Kernel, now: Kernel) -> None:
    found = verdict(Mark("training", 10, then), now)
    if then.boot != now.boot or not now.boot:
        assert found == "other"
        return
    grown = replace(then, machine_kills=(then.machine_kills or 0) + 1, group_kills=(then.group_kills or 0) + 1)
    assert verdict(Mark("training", 10, then), grown) == "memory"


@given(st.builds(Mark, doing=st.text(), predicted_peak_bytes=st.integers(0, 1 << 40), kernel=kernels))
def test_a_mark_comes_back_from_json(mark: Mark) -> None:
    assert Mark.from_json(mark.to_json()) == mark


@pytest.mark.parametrize(
    "damage", [{}, {"doing": "x"}, {"doing": "x", "predicted_peak_bytes": 1, "kernel": {"odd": 1}}]
)
def test_a_mark_that_cannot_be_read_is_one_clear_line(damage: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="mark of unfinished work"):
        Mark.from_json(damage)


@given(st.none() | st.integers(1, 1 << 40), st.integers(1, 1 << 40))
def test_a_ceiling_only_falls_and_ends_below_the_plan_that_failed(ceiling: int | None, predicted: int) -> None:
    after = lowered(ceiling, predicted)

    assert after <= STEP_DOWN * predicted < predicted
    assert ceiling is None or after <= ceiling
    assert lowered(after, predicted) == after, "the same failure judged twice lowers it once"


def test_no_plan_no_blame() -> None:
    with pytest.raises(ValueError, match="predicted peak of 0"):
        lowered(None, 0)
