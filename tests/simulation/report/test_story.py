"""What is read in an event log, and what is said about a broken one."""

from __future__ import annotations

import pytest

from edge_runtime.errors import DataError
from simulation.report.story import told
from tests.simulation.report import logs


def test_a_log_tells_who_did_what() -> None:
    story = logs.story(logs.LOSSES, "crash", "crash", "dropout")
    assert [row.loss for row in story.versions] == list(logs.LOSSES)
    assert story.groups == {"pi-0": "pi", "pi-1": "pi", "nano-0": "nano"}
    assert [each.data for each in story.devices] == [(4, 0), (2, 2), (1, 3)]
    assert story.begun == {1: 0.0, 2: 3600.0, 3: 7200.0}
    assert (len(story.bars), len(story.arrivals)) == (9, 6)
    assert story.failures == {"crash": 2, "dropout": 1}
    assert (story.seconds, story.finished, story.asked) == (10800.0, True, 3)


def test_a_device_that_plans_again_counts_once() -> None:
    lines = logs.log().splitlines()
    again = told([*lines[:3], lines[1].replace('"rank": 4', '"rank": 1'), *lines[3:]], "a log")
    assert [each.rank for each in again.devices] == [1, 4, 2]


def test_real_training_tells_no_classes() -> None:
    lines = logs.log().splitlines()
    story = told([line.replace("[4, 0]", "4").replace("[2, 2]", "4") for line in lines], "a log")
    assert [each.data for each in story.devices] == [(), (), (1, 3)]


def test_a_run_that_has_not_ended_has_not_finished() -> None:
    story = told(logs.log().splitlines()[:-1], "a log")
    assert (story.finished, story.why, len(story.versions)) == (False, "", 3)


@pytest.mark.parametrize("broken", ['{"t": 1, "ev', "[]", '{"event": "end"}', '{"t": 1, "event": "span"}', "7"])
def test_a_broken_line_is_named(broken: str) -> None:
    with pytest.raises(DataError, match=r"events\.jsonl:2: expected an event"):
        told([logs.log().splitlines()[0], broken], "events.jsonl")


def test_a_log_without_its_fleet_is_refused() -> None:
    with pytest.raises(DataError, match="whose first line is its fleet; found none"):
        told(logs.log().splitlines()[1:], "a log")
