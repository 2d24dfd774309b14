"""A device that stays alive: it steps down when memory runs out, learns why it was killed, pauses when it must."""

from __future__ import annotations

from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import DataError, DeviceMemoryError, PlanError
from edge_runtime.governor import Readings, Thresholds
from edge_runtime.keeper import TELL_SECONDS, Watch
from edge_runtime.survival import Kernel
from edge_runtime.wire.messages import Hello, Message, Offer, Report, ungroup
from tests.runtime.desk import GOAL, WELCOME, Desk, adapter, of, offered, states
from tests.runtime.fleets import BRISK, PAIR, Devices, fleet_in
from tests.runtime.said import directive
from tests.runtime.toy import RANK_BYTES, ToyTrainer
from tests.runtime.turns import Killed

STILL = Kernel(boot="one", machine_kills=3)
GREW = Kernel(boot="one", machine_kills=4)


def seated(desk: Desk, trainer: ToyTrainer, watch: Watch | None = None) -> Desk:
    """The desk with another device at it."""
    desk.disk.close()
    desk.trainer, desk.watch = trainer, watch or desk.watch
    desk.begin()
    return desk


def welcomed(desk: Desk, first: Message) -> list[Message]:
    """Say something, and welcome the device as often as it introduces itself; all that it says."""
    said = found = desk.tell(first)
    while of(Hello, found):
        found = desk.tell(WELCOME)
        said = said + found
    return said


def ranks(said: list[Message]) -> list[int]:
    return [max(ungroup(hello.groups).trained.values()) for hello in of(Hello, said)]


# ── memory that runs out ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_plan_that_does_not_fit_is_followed_by_smaller_ones_until_one_does(desk: Desk) -> None:
    seated(desk, ToyTrainer(GOAL, rank=8, held=8, bears=5))
    said = welcomed(desk, desk.publish(adapter(1)))
    [offer] = of(Offer, said)

    assert ranks(said) == [8, 7, 6, 5]
    assert desk.trainer.ceilings == [None, 7200, 6300, 5400]
    assert desk.disk.fact("memory_ceiling") == 5400
    assert desk.disk.fact("unfinished") is None
    assert offer.round == 1
    told = [report.detail for report in of(Report, said) if report.state == "planned"]
    assert "did not fit" not in told[0]
    assert all("did not fit, so from now on plans stay below" in detail for detail in told[1:])


def test_what_a_device_that_stepped_down_sends_is_what_one_of_that_rank_sends(desk: Desk, tmp_path: Path) -> None:
    seated(desk, ToyTrainer(GOAL, rank=8, held=8, bears=5))
    [offer] = of(Offer, welcomed(desk, desk.publish(adapter(1))))
    other = seated(Desk(tmp_path / "other"), ToyTrainer(GOAL, rank=5, held=8))
    [plain] = of(Offer, welcomed(other, other.publish(adapter(1))))
    other.disk.close()

    assert offer == plain


def test_the_ceiling_holds_after_a_restart_and_in_another_life_of_the_fleet(desk: Desk) -> None:
    seated(desk, ToyTrainer(GOAL, rank=8, held=8, bears=5))
    welcomed(desk, desk.publish(adapter(1)))
    desk.trainer = ToyTrainer(GOAL, rank=8, held=8, bears=5)
    desk.restart()
    said = welcomed(desk, desk.publish(adapter(1), run="two"))

    assert ranks(said) == [5]
    assert of(Offer, said)


def test_a_device_that_steps_down_below_its_smallest_plan_says_so_and_ends(desk: Desk) -> None:
    seated(desk, ToyTrainer(GOAL, rank=2, held=2, bears=0))
    with pytest.raises(PlanError, match="a direction takes"):
        welcomed(desk, desk.publish(adapter(1)))

    assert of(Report, desk.heard())[-1].state == "failed"
    assert desk.disk.fact("unfinished") is None


def test_memory_that_runs_out_before_there_is_a_plan_is_a_failure(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any) -> Any:
        raise DeviceMemoryError("memory ran out while probing")

    monkeypatch.setattr(desk.trainer, "introduce", fail)
    with pytest.raises(DeviceMemoryError, match="while probing"):
        desk.tell(directive("gather", 0))
    assert desk.disk.fact("memory_ceiling") is None


@pytest.mark.parametrize("work", ["receive", "evaluate"])
def test_memory_may_run_out_in_any_work(desk: Desk, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    seated(desk, ToyTrainer(GOAL, rank=8, held=8))
    able, tries = getattr(desk.trainer, work), iter(range(2))

    def work_at_last(*args: Any) -> Any:
        if next(tries, None) is not None:
            raise DeviceMemoryError("memory ran out")
        return able(*args)

    monkeypatch.setattr(desk.trainer, work, work_at_last)
    said = welcomed(desk, desk.publish(adapter(1)))

    assert ranks(said) == [8, 7, 6]
    assert of(Offer, said)


def test_memory_that_runs_out_at_the_very_end_still_leads_to_a_personal_adapter(desk: Desk) -> None:
    seated(desk, ToyTrainer(GOAL, rank=8, held=8, bears=7))
    said = welcomed(desk, desk.publish(adapter(1), "finish", 1, version=1))

    assert ranks(said) == [8, 7]
    assert states(said)[-1] == "done"
    assert desk.delivered == 1


def test_a_fleet_merges_the_smaller_slice_of_a_device_that_stepped_down_in_the_round(folder: Path) -> None:
    """The server knew it with a larger rank when the round began; the result is that of a device of the final rank."""
    digests = []
    for name, trainer in (
        ("stepped", partial(ToyTrainer, GOAL, rank=8, bears=3)),
        ("modest", partial(ToyTrainer, GOAL, rank=3)),
    ):
        devices: Devices = {**PAIR, "c": trainer}
        fleet = fleet_in(
            folder, name, *BRISK, "training.max_steps=2", "rounds.min_available_nodes=3", devices=devices
        ).run()
        assert set(fleet.merges()) == {(1, 3), (2, 3)}
        digests.append(fleet.merged().digest())
        if name == "stepped":
            [device] = fleet.trainers["c"]
            assert device.ceilings == [None, 7200, 6300, 5400, 4500, 3600]
            assert device.rounds == [1, 1, 1, 1, 1, 1, 2], "the second round begins with the plan that fits"
            assert fleet.state is not None
            assert ungroup(fleet.state.members["c"].hello.groups).trained.popitem()[1] == 3

    assert digests[0] == digests[1]


# ── killed ────────────────────────────────────────────────────────────────────────────────────────────────────────


def killed(desk: Desk, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    """The process of the device ends in the middle of its work, without a word."""

    def end(*_args: Any) -> Any:
        raise Killed(work)

    monkeypatch.setattr(desk.trainer, work, end)
    with pytest.raises(Killed):
        welcomed(desk, desk.publish(adapter(1)))
    desk.heard()


@pytest.mark.parametrize("work", ["receive", "evaluate", "train"])
def test_a_device_that_the_kernel_killed_steps_down_says_so_and_resumes_the_round(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    seated(desk, ToyTrainer(GOAL, rank=8, held=8), Watch(clock=desk.clock, kernel=lambda: STILL))
    killed(desk, monkeypatch, work)
    mark = desk.disk.fact("unfinished")
    assert (mark["doing"], mark["predicted_peak_bytes"]) == ("training round 1", 8 * RANK_BYTES)

    desk.trainer, desk.watch = ToyTrainer(GOAL, rank=8, held=8), Watch(clock=desk.clock, kernel=lambda: GREW)
    desk.restart()
    said = desk.work() + welcomed(desk, WELCOME)

    assert any("the kernel killed this device for its memory while training round 1" in note for note in desk.notes)
    assert ranks(said) == [7]
    [planned] = [report for report in of(Report, said) if report.state == "planned"]
    assert "the kernel killed this device" in planned.detail
    assert len(of(Offer, said)) == 1
    assert desk.disk.fact("unfinished") is None


def test_a_device_that_somebody_else_killed_goes_on_as_before(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    seated(desk, ToyTrainer(GOAL, rank=8, held=8), Watch(clock=desk.clock, kernel=lambda: STILL))
    killed(desk, monkeypatch, "train")
    desk.trainer = ToyTrainer(GOAL, rank=8, held=8)
    desk.restart()
    said = desk.work() + welcomed(desk, WELCOME)

    assert ranks(said) == [8]
    assert desk.disk.fact("memory_ceiling") is None
    assert any("not for want of memory" in note for note in desk.notes)


def test_a_kill_while_the_base_is_loaded_is_marked_with_the_new_plan(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    seated(desk, ToyTrainer(GOAL, rank=8, held=8), Watch(clock=desk.clock, kernel=lambda: STILL))

    def introduce(_spec: Any, _training: Any, _ceiling: Any, on_plan: Any) -> Any:
        on_plan(1234)
        raise Killed("loading")

    monkeypatch.setattr(desk.trainer, "introduce", introduce)
    with pytest.raises(Killed):
        desk.tell(directive("gather", 0))
    mark = desk.disk.fact("unfinished")
    assert (mark["doing"], mark["predicted_peak_bytes"]) == ("loading the base model", 1234)


def test_orderly_failures_leave_no_mark(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any) -> Any:
        raise DataError("an example is odd")

    monkeypatch.setattr(desk.trainer, "evaluate", fail)
    with pytest.raises(DataError):
        welcomed(desk, desk.publish(adapter(1)))
    assert desk.disk.fact("unfinished") is None


# ── pauses ────────────────────────────────────────────────────────────────────────────────────────────────────────

HOT, COOL = Readings(temperature_celsius=90.0), Readings(temperature_celsius=60.0)
LEVELS = Thresholds(pause_above_temperature=85.0, resume_below_temperature=80.0)


def sensing(desk: Desk, *readings: Readings, **changes: Any) -> Watch:
    """A watch that looks before the evaluation, before each step, and every four seconds of a pause; cool at last."""

    def wait(_seconds: float) -> None:
        desk.clock.now += 4.0

    looks = chain(readings, repeat(COOL))
    facts: dict[str, Any] = {"thresholds": LEVELS, "sense": lambda: next(looks), "check_every": 0.0, "wait": wait}
    return Watch(clock=desk.clock, **(facts | changes))


def test_a_device_pauses_says_why_goes_on_and_sends_the_very_same_update(desk: Desk, tmp_path: Path) -> None:
    # Hot before the second step, and for five more looks: sixteen seconds.
    seated(desk, ToyTrainer(GOAL, rank=2, held=4), sensing(desk, COOL, COOL, *[HOT] * 6))
    said = welcomed(desk, desk.publish(adapter(1)))
    other = seated(Desk(tmp_path / "other"), ToyTrainer(GOAL, rank=2, held=4))
    unpaused = offered(other)
    other.disk.close()
    paused = [report for report in of(Report, said) if report.state == "paused"]

    assert of(Offer, said) == [unpaused]
    assert desk.disk.outbox is not None
    assert states(said)[-4:] == ["training", "paused", "training", "offering"]
    assert len(paused) == 1 + int(16 // TELL_SECONDS)
    assert all("the device is at 90 °C" in report.detail for report in paused)
    assert desk.notes.count("training goes on") == 1
    assert desk.clock.now == 5 * 4.0


def test_a_device_that_is_hot_does_not_even_begin(desk: Desk) -> None:
    seated(desk, ToyTrainer(GOAL, rank=2, held=4), sensing(desk, HOT, HOT))
    assert states(welcomed(desk, desk.publish(adapter(1))))[:4] == ["planned", "fetching", "paused", "evaluating"]


def test_a_device_that_pauses_can_be_stopped_and_leaves_no_mark(desk: Desk) -> None:
    pauses: list[float] = []
    watch = sensing(desk, COOL, COOL, *[HOT] * 100, wait=pauses.append, stop=lambda: len(pauses) == 3)
    seated(desk, ToyTrainer(GOAL, rank=2, held=4), watch)
    with pytest.raises(KeyboardInterrupt):
        welcomed(desk, desk.publish(adapter(1)))

    assert len(pauses) == 3
    assert (desk.disk.outbox, desk.disk.fact("unfinished")) == (None, None)


def test_sensors_are_read_no_more_often_than_asked_for(desk: Desk) -> None:
    looks: list[float] = []

    def sense() -> Readings:
        looks.append(desk.clock.now)
        return COOL

    seated(desk, ToyTrainer(GOAL, rank=2, held=4), sensing(desk, sense=sense, check_every=60.0))
    offered(desk)
    assert looks == [0.0]


def test_without_thresholds_no_sensor_is_read(desk: Desk) -> None:
    def sense() -> Readings:
        raise AssertionError("a sensor was read")

    seated(desk, ToyTrainer(GOAL, rank=2, held=4), sensing(desk, sense=sense, thresholds=Thresholds()))
    assert offered(desk).round == 1
