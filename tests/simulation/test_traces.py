from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import DataError
from simulation.settings import Availability
from simulation.traces import DAY, HOUR, Trace, read, trace

HEAD = "device,from,to"


def changes(found: Trace, count: int) -> list[tuple[float, bool]]:
    """The first changes, and what it is afterwards."""
    now, seen = 0.0, []
    for _ in range(count):
        now = found.next_change(now)
        if now == float("inf"):
            break
        seen.append((now, found.is_on(now)))
    return seen


@given(st.integers(0, 1000), st.sampled_from(["exponential", "diurnal"]))
def test_a_generated_trace_goes_on_and_off_in_turn_and_is_the_same_for_the_same_seed(
    seed: int, kind: Literal["exponential", "diurnal"]
) -> None:
    settings = Availability(kind=kind)
    found = changes(trace(settings, seed, "a", {}), 40)
    assert found == changes(trace(settings, seed, "a", {}), 40)
    assert found != changes(trace(settings, seed, "b", {}), 40)
    assert all(later > sooner for (sooner, _), (later, _) in itertools.pairwise(found))
    assert all(now != then for (_, now), (_, then) in itertools.pairwise(found))


def test_an_exponential_trace_is_on_for_its_share_of_the_time() -> None:
    settings = Availability(kind="exponential", on_hours=2, off_hours=6)
    found = changes(trace(settings, 0, "a", {}), 4000)
    ends = [(begin, end) for (begin, on), (end, _) in itertools.pairwise(found) if on]
    assert sum(end - begin for begin, end in ends) / found[-1][0] == pytest.approx(0.25, abs=0.03)


def test_a_diurnal_trace_is_on_at_night() -> None:
    found = trace(Availability(kind="diurnal", from_hour=22, on_hours=8, spread_hours=0.2), 0, "a", {})
    for day in range(5):
        assert found.is_on(day * DAY + 2 * HOUR)
        assert not found.is_on(day * DAY + 12 * HOUR)


def test_a_trace_may_be_asked_in_any_order() -> None:
    settings = Availability(kind="exponential")
    whole, again = trace(settings, 0, "a", {}), trace(settings, 0, "a", {})
    times = [HOUR * number / 3 for number in range(100)]
    forward = [whole.is_on(time) for time in times]
    again.is_on(times[-1])
    assert [again.is_on(time) for time in reversed(times)] == forward[::-1]


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_a_file_says_when_a_device_is_there(tmp_path: Path, ending: str) -> None:
    rows = [("a", 0, 1), ("a", 2, 3.5), ("b", 1, 2)]
    path = tmp_path / f"trace.{ending}"
    if ending == "csv":
        path.write_text("\n".join([HEAD, *(",".join(map(str, row)) for row in rows)]))
    else:
        path.write_text(json.dumps([dict(zip(("device", "from", "to"), row, strict=True)) for row in rows]))
    found = read(path)
    assert found == {"a": [(0, HOUR), (2 * HOUR, 3.5 * HOUR)], "b": [(HOUR, 2 * HOUR)]}
    settings = Availability(kind="file", file=path)
    assert changes(trace(settings, 0, "a", found), 9) == [
        (HOUR, False), (2 * HOUR, True), (3.5 * HOUR, False),
    ]  # fmt: skip
    with pytest.raises(DataError, match="no rows of 'c'"):
        trace(settings, 0, "c", found)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["a,2,1"], "line 2: time runs backwards"),
        (["a,1,1"], "line 2: time runs backwards"),
        (["a,0,2", "a,1,3"], "line 3: time runs backwards"),
        (["a,5,6", "a,0,1"], "line 3: time runs backwards"),
        (["a,0,x"], "line 2: expected hours"),
        (["a,nan,1"], "line 2: expected hours"),
        (["a,-1,1"], "line 2: expected hours"),
        ([",0,1"], "line 2: expected a device's name"),
        ([], "no rows"),
    ],
)
def test_a_file_that_cannot_be_is_refused_by_its_line(tmp_path: Path, rows: list[str], said: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("\n".join([HEAD, *rows]))
    with pytest.raises(DataError, match=said):
        read(path)


def test_a_recording_that_says_on_and_off_may_have_no_gaps(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(f"{HEAD},on\na,0,1,1\na,1,2,0\na,2,3,1\na,3,4,1\n")
    assert read(path) == {"a": [(0, HOUR), (2 * HOUR, 4 * HOUR)]}
    path.write_text(f"{HEAD},on\na,0,1,1\na,2,3,1\n")
    with pytest.raises(DataError, match="line 3: a gap"):
        read(path)


@pytest.mark.parametrize("text", ["{}", "[1]", "nonsense", '[{"device": "a"}]'])
def test_json_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"trace\.json"):
        read(path)
