"""Figures of the run that was written by hand: what is drawn where, and what their titles claim."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from simulation.report import curves, effort, people, style, timeline
from simulation.report.protocols import Judged
from simulation.report.story import told
from tests.simulation.report import logs

pytest.importorskip("matplotlib")


def titles(figure: Any) -> list[str]:
    return [axis.get_title(loc="left") for axis in figure.axes if axis.get_title(loc="left")]


def test_a_loss_is_drawn_against_each_of_its_costs() -> None:
    figure = curves.losses([Judged({}, logs.story(), "run")])
    found = [axis.lines[0].get_xydata().tolist() for axis in figure.axes]
    costs = [(1, 2, 3), (1, 2, 3), (3, 6, 9), (100, 200, 300)]
    assert found == [[[x, y] for x, y in zip(xs, logs.LOSSES, strict=True)] for xs in costs]
    assert titles(figure) == ["3 rounds", "3 h of virtual time", "9 MiB sent and received", "300 J used"]
    assert figure.get_suptitle() == "Loss 0.8 → 0.4 in 3 rounds, 3 h of virtual time"


def test_runs_of_a_sweep_share_axes_and_the_best_is_named() -> None:
    runs = [Judged({}, logs.story(), "a"), Judged({}, logs.story((0.8, 0.2)), "b")]
    figure = curves.losses(runs)
    assert [line.get_label() for line in figure.axes[0].lines] == ["a", "b"]
    assert figure.get_suptitle() == "Losses end at 0.2 to 0.4; lowest: b"
    assert curves.headline([runs[0], runs[0]]) == "All losses end at 0.4"


def test_truncation_is_drawn_in_percent() -> None:
    figure = curves.truncation([Judged({}, logs.story(), "run")])
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xydata(), [[1, 1], [2, 2], [3, 3]])
    assert titles(figure) == ["Truncation lost at most 3 % of a merged change"]


def real(*accuracies: float | None) -> Judged:
    versions = [{**logs.version(at, None), "accuracy": share} for at, share in enumerate(accuracies, 1)]
    return Judged({}, told(map(json.dumps, [logs.fleet(), *versions]), "a log"), "real")


def test_accuracy_is_drawn_in_percent_where_there_is_one() -> None:
    figure = curves.accuracies([real(None, 0.25, 0.5)])
    assert [axis.lines[0].get_xydata().tolist() for axis in figure.axes[:2]] == [[[2, 25], [3, 50]]] * 2
    assert figure.get_suptitle() == "25.0% → 50.0% of held-out tokens are those that the model holds most likely"
    both = [real(0.25), Judged({}, real(0.75).story, "better")]
    assert curves.accuracy_headline(both) == "Accuracies end at 25.0% to 75.0%; highest: better"
    assert curves.accuracies_of(Judged({}, logs.story(), "surrogate")) == []


def test_devices_that_trained_again_say_what_was_learnt_where_rounds_ask_others() -> None:
    def update(device: str, loss: float, accuracy: float | None) -> dict[str, Any]:
        return {"t": 1.0, "event": "update", "device": device, "held_out": loss, "accuracy": accuracy}

    updates = [update("pi-0", 4.0, 0.2), update("once", 1.0, 0.9), update("pi-0", 9.0, 0.9), update("pi-1", 2.0, 0.4)]
    updates += [update("pi-0", 3.0, 0.3), update("pi-1", 1.0, 0.5)]
    lines = [logs.fleet(), *updates, {**logs.version(1, None), "accuracy": 0.5}]
    run = Judged({}, told(map(json.dumps, lines), "a log"), "real")
    assert curves.headline([run]) == "Held-out loss 3 → 2 on the 2 devices that trained more than once"
    assert curves.accuracy_headline([run]) == (
        "Held-out accuracy 30.0% → 40.0% on the 2 devices that trained more than once"
    )


def test_what_a_round_took_is_told_by_kind() -> None:
    spent = [{"t": 1.0, "event": "spent", "device": name, "joules": 60.0} for name in ("pi-0", "nano-0")]
    story = told([*logs.log().splitlines(), *map(json.dumps, spent)], "a log")
    assert effort.efforts(story) == [
        effort.Effort("pi", (900.0,) * 3, 60.0, 3), effort.Effort("nano", (2700.0,) * 3, 60.0, 3),
    ]  # fmt: skip
    figure = effort.effort(story)
    assert titles(figure) == ["Slowest: nano, 45 min a round", "Energy: 120 J in all"]
    assert [text.get_text() for text in figure.axes[1].texts] == ["20 J an update"] * 2


def test_personal_adapters_are_drawn_beside_the_global_one() -> None:
    facts = {"t": 9.0, "event": "personal", "held_out": 0.5}
    own = [
        {**facts, "device": "pi-0", "personal": 0.4, "accuracy": 0.5, "personal_accuracy": 0.7},
        {**facts, "device": "nano-0", "personal": 0.6, "accuracy": 0.3, "personal_accuracy": 0.3},
    ]
    story = told([*logs.log().splitlines(), *map(json.dumps, own)], "a log")
    figure = effort.personal(story)
    assert titles(figure) == ["Own adapters: lower loss on 1 of 2 devices", "Mean accuracy: 40 → 50 %"]
    assert [axis.get_offsets().tolist() for axis in figure.axes[0].collections] == [[[0.5, 0.4]], [[0.5, 0.6]]]
    assert [bar.get_width() for bar in figure.axes[1].patches] == pytest.approx([50, 30, 70, 30])
    without = [{key: value for key, value in each.items() if "accuracy" not in key} for each in own]
    surrogate = told([*logs.log().splitlines(), *map(json.dumps, without)], "a log")
    assert titles(effort.personal(surrogate))[1] == "Mean loss: 0.5 → 0.5"


def test_no_two_of_28_lines_look_alike() -> None:
    assert len({tuple(style.line(number).values()) for number in range(28)}) == 28


def test_a_groups_time_is_all_accounted_for() -> None:
    shares = timeline.shares(logs.story())
    pi = {kind: share for kind, share in shares["pi"].items() if share}
    assert pi == pytest.approx({"computing": 0.125, "away": 0.25, "waiting": 0.625})
    assert shares["nano"]["computing"] == pytest.approx(0.75)
    assert titles(timeline.spent(logs.story())) == ["Busiest: nano, which computed 75% of its time"]


def test_the_one_that_closed_a_round_is_a_straggler_by_what_it_came_after_the_middle() -> None:
    assert timeline.late(logs.story()) == [timeline.Late(number, "nano-0", 2700.0, 900.0) for number in (1, 2, 3)]
    figure = timeline.stragglers(logs.story())
    assert titles(figure) == [
        "A round's last update comes 15 min after its middle one, on average",
        "Whose update was last",
    ]
    assert [bar.get_width() for bar in figure.axes[1].patches] == [0, 3]


def test_a_timeline_has_a_bar_for_each_span() -> None:
    axis = timeline.gantt(logs.story()).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["pi-0", "pi-1", "nano-0"]
    drawn = {(bar.get_x(), bar.get_width(), round(bar.get_y() + bar.get_height() / 2)) for bar in axis.patches}
    assert {(0.0, 0.25, 0), (1.0, 0.25, 0), (0.0, 0.5, 1), (2.0, 0.75, 2)} <= drawn


def test_of_a_large_fleet_those_most_at_work_are_shown_of_each_group() -> None:
    many = [logs.device(f"idle-{number}", "idle", 4) for number in range(30)]
    many += [logs.device(f"busy-{number}", "busy", 4) for number in range(70)]
    spans = [logs.span(f"busy-{number}", "computing", 0, 1, 1) for number in (69, 3)]
    events = [logs.fleet(), *many, *spans, logs.version(1, 0.5)]
    story = told(map(json.dumps, events), "a log")
    assert timeline.shown(story, 5) == ["idle-0", "busy-0", "busy-3", "busy-69"]


def test_only_the_first_rounds_of_a_long_run_are_in_a_timeline() -> None:
    story = logs.story((0.5,) * 10)
    assert timeline.until(story) == (8 * 3600.0, 8)
    assert timeline.until(logs.story()) == (3 * 3600.0, 3)


def test_plans_are_told_by_kind() -> None:
    assert [(each.group, each.rank, count) for each, count in people.kinds(logs.story())] == [
        ("pi", 4, 2),
        ("nano", 2, 1),
    ]
    assert titles(people.plans(logs.story())) == ["Plans by kind of device: ranks 2 to 4"]


def test_a_partition_is_drawn_class_by_device_and_summed_up_for_many() -> None:
    figure = people.partition(logs.story())
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), [[4, 2, 1], [0, 2, 3]])
    assert titles(figure) == ["Who has what: a device's main class is 75% of its examples"]
    events = [logs.fleet(), *(logs.device(f"pi-{number}", "pi", 4, [3, 1]) for number in range(people.CELLS + 1))]
    many = people.partition(told(map(json.dumps, events), "a log"))
    assert titles(many) == [
        "Half of the devices have 4 examples or fewer",
        "A device's main class is 75 % of its examples",
    ]


@pytest.mark.parametrize(
    "draw",
    [timeline.gantt, timeline.spent, timeline.stragglers, people.plans, people.partition, effort.effort],
)
def test_a_fleet_that_never_began_can_be_drawn(draw: Any) -> None:
    figure = draw(told([json.dumps(logs.fleet())], "a log"))
    assert figure.axes


@pytest.mark.parametrize(
    ("value", "units", "words"),
    [
        (90.0, style.TIMES, "1.5 min"),
        (5400.0, style.TIMES, "1.5 h"),
        (0.0, style.TIMES, "0 s"),
        (12.0, {"": 1.0}, "12"),
        (1122.3, style.ENERGIES, "1,120 J"),
        (999.9, style.ENERGIES, "1,000 J"),
        (0.0123456, style.TIMES, "0.0123 s"),
    ],
)
def test_quantities_have_the_unit_that_fits(value: float, units: dict[str, float], words: str) -> None:
    assert style.worded(value, units) == words
