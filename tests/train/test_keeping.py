"""Which state a round begins with, and when states are written."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from edge_runtime.lora.adapter import Matrix
from edge_runtime.train import round_file
from edge_runtime.train.keeping import FINISHED, IN_PROGRESS, Keeping, KeptRounds, RoundName, key_of
from edge_runtime.train.resume import RoundState, StepReport

pytestmark = pytest.mark.torch

NAME = RoundName(3, key_of("round 3"), key_of("base"), "adamw")
NEXT = RoundName(4, key_of("round 4"), key_of("base"), "adamw")


def parameters(seed: int = 0) -> dict[str, Matrix]:
    draw = np.random.default_rng(seed)
    return {f"x.{leaf}": draw.standard_normal((4, 4)).astype(np.float32) for leaf in "ab"}


def state_of(steps: int) -> RoundState:
    """A round after so many steps, with AdamW's moments."""
    moments = {
        name: {"step": np.array(steps, np.float32), "exp_avg": values, "exp_avg_sq": values**2}
        for name, values in parameters(steps).items()
    }
    reports = tuple(StepReport(at + 1, 9, 1.0, 3, 1e-3, 0.1) for at in range(steps))
    return RoundState(reports, parameters(), moments, steps)


class Device:
    """The kept rounds of a device, what they said, and a clock that is set by hand."""

    def __init__(self, folder: Path | None, *, every_steps: int = 3, every_seconds: float = 60.0) -> None:
        self.said: list[str] = []
        self.now = 0.0
        self.folder = folder
        keeping = None if folder is None else Keeping(folder, every_steps, every_seconds, lambda: self.now)
        self.kept = KeptRounds(keeping, self.said.append)

    def begin(self, name: RoundName = NAME, *, carry: bool = False) -> RoundState | None:
        return self.kept.begin(name, parameters, carry=carry)

    def writes(self, steps: int, seconds: float = 0.0) -> list[int]:
        """After which of so many steps a state was written."""
        written: list[int] = []

        def state(step: int) -> RoundState:
            written.append(step)
            return state_of(step)

        for step in range(1, steps + 1):
            self.now += seconds
            self.kept.stepped(lambda step=step: state(step))  # type: ignore[misc]  # mypy: a default in a lambda
        return written


def steps_of(state: RoundState | None) -> int | None:
    return None if state is None else len(state.reports)


def test_a_state_is_written_every_so_many_steps_or_seconds_whichever_comes_first(tmp_path: Path) -> None:
    for seconds, expected in ((0.0, [3, 6, 9]), (31.0, [2, 4, 6, 8, 10]), (90.0, list(range(1, 11)))):
        device = Device(tmp_path)
        device.begin()

        assert device.writes(10, seconds) == expected


def test_a_killed_round_goes_on_from_the_last_write_and_no_other_round_does(tmp_path: Path) -> None:
    killed = Device(tmp_path)
    assert killed.begin() is None
    killed.writes(7)

    assert steps_of(Device(tmp_path).begin()) == 6
    other = Device(tmp_path)
    assert other.begin(replace(NAME, key=key_of("other data"))) is None
    assert "another round, plan or data set (round 3); it is ignored" in other.said[0]


def test_a_round_that_was_interrupted_in_between_loses_no_step(tmp_path: Path) -> None:
    for folder in (tmp_path, None):
        device = Device(folder)
        device.begin()
        device.kept.interrupted(state_of(5))

        assert steps_of(device.begin()) == 5
        device.kept.forget()
    assert steps_of(Device(tmp_path).begin()) == 5


def test_a_round_that_stopped_before_its_first_step_leaves_nothing(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.begin()
    device.kept.interrupted(state_of(0))

    assert list(tmp_path.iterdir()) == []
    assert device.begin() is None


def test_a_finished_round_is_there_at_once_when_it_is_asked_for_again(tmp_path: Path) -> None:
    """It may have been killed between its last step and the outbox."""
    device = Device(tmp_path)
    device.begin()
    device.writes(9)
    device.kept.finished(state_of(9))
    assert [path.name for path in tmp_path.iterdir()] == [FINISHED]

    again = Device(tmp_path)
    assert steps_of(again.begin()) == 9
    again.kept.finished(state_of(9))
    assert again.begin(NEXT) is None
    assert again.said == []


@pytest.mark.parametrize("file", [IN_PROGRESS, FINISHED])
def test_a_damaged_file_is_told_about_and_the_round_begins_anew(tmp_path: Path, file: str) -> None:
    device = Device(tmp_path)
    device.begin()
    device.writes(3)
    if file == FINISHED:
        device.kept.finished(state_of(9))
    content = bytearray((tmp_path / file).read_bytes())
    content[-1] ^= 1
    (tmp_path / file).write_bytes(bytes(content))
    again = Device(tmp_path)

    assert again.begin() is None
    assert "damaged and is ignored" in again.said[0]
    again.writes(3)
    assert steps_of(Device(tmp_path).begin()) == 3


def test_a_folder_that_cannot_be_written_is_told_about_and_training_goes_on(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder", encoding="utf-8")
    device = Device(blocked)
    assert device.begin() is None
    device.writes(3)
    device.kept.interrupted(state_of(4))

    assert "could not be kept" in device.said[-1]
    assert steps_of(device.begin()) == 4, "this process still knows"


def test_a_full_disk_is_told_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    device = Device(tmp_path)
    device.begin()
    device.writes(3)

    assert "No space left on device" in device.said[0]


@pytest.mark.parametrize("on_disk", [True, False])
def test_moments_are_carried_into_the_next_round_if_that_is_wanted(tmp_path: Path, on_disk: bool) -> None:
    device = Device(tmp_path if on_disk else None)
    device.begin(carry=True)
    device.kept.finished(state_of(9))
    assert device.begin(NEXT) is None
    start = device.begin(NEXT, carry=True)

    assert start is not None
    assert (start.reports, set(start.moments)) == ((), {"x.a", "x.b"})
    assert float(start.moments["x.a"]["step"]) == 9
    assert "remembers the last round in 1 of 1 layers" in device.said[-1]


@pytest.mark.parametrize(
    "name", [replace(NEXT, lineage=key_of("another base")), replace(NEXT, number=3), replace(NEXT, number=1)]
)
def test_no_moments_come_from_another_base_or_from_another_life_of_the_fleet(tmp_path: Path, name: RoundName) -> None:
    device = Device(tmp_path)
    device.begin()
    device.kept.finished(state_of(9))

    assert device.begin(name, carry=True) is None


def test_a_state_is_of_no_use_to_a_round_that_begins_with_other_moments(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.begin()
    device.kept.finished(state_of(9))
    device.begin(NEXT, carry=True)
    device.writes(3)

    assert steps_of(Device(tmp_path).begin(NEXT, carry=True)) == 3
    assert Device(tmp_path).begin(NEXT, carry=False) is None
    round_file.write(tmp_path / FINISHED, state_of(8), {"key": "k", "full": "f", "lineage": NAME.lineage, "round": "2"})
    anew = Device(tmp_path).begin(NEXT, carry=True)
    assert steps_of(anew) == 0


def test_nothing_is_held_in_memory_of_a_round_that_is_on_disk(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.begin(carry=True)
    device.kept.interrupted(state_of(5))
    device.kept.finished(state_of(9))

    assert device.kept._interrupted is None
    assert device.kept._last is None
