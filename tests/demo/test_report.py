"""The RESULT object: which figures it has, and when the goals are met."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.demo.board import bytes_as_fp32
from edge_runtime.demo.limits import Limit
from edge_runtime.demo.report import COMPARE, GOALS, result, truncations
from edge_runtime.demo.story import Ending
from edge_runtime.wire.messages import Losses, Message, Presence
from tests.demo.fleet import board_of, life
from tests.runtime import said

DEVICE = {
    "device", "rank", "bits", "layers", "loss_base", "loss_global", "loss_personal", "bytes_up", "bytes_down"
}  # fmt: skip
FIGURES = {"seconds", "devices", "bytes_ratio", "export_max_logit_diff"}
"""What the contract of the benchmarks names."""

UNLIKE = {"laptop": life("laptop", rank=4), "nano": life("nano", rank=2), "pi": life("pi", rank=2, layers=1)}


def ending(lives: Mapping[str, list[Message]], *, seconds: float = 60.0, failures: tuple[str, ...] = ()) -> Ending:
    """How a demo of these devices ended."""
    limits = {name: Limit(1 << 30, None, "declared only") for name in lives}
    return Ending(board_of(lives), limits, seconds, failures)


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    """What a server recorded in two rounds."""
    path = tmp_path / "metrics.jsonl"
    events: list[dict[str, Any]] = [
        {"event": "report", "client": "pi"},
        {"event": "merge", "round": 2, "truncation": 0.02},
        {"event": "merge", "round": 1, "truncation": 0.5},
        {"event": "merge", "round": 1, "truncation": 0.01},
    ]
    path.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return path


def test_the_result_has_the_figures_of_the_contract_and_is_json(metrics: Path) -> None:
    outcome = result(ending(UNLIKE), metrics)

    assert json.loads(json.dumps(outcome)) == outcome
    assert set(outcome) == {"name", "figures", "goals", "met"}
    assert outcome["name"] == "demo"
    assert set(outcome["figures"]) >= FIGURES
    assert all(set(device) >= DEVICE for device in outcome["figures"]["devices"])


def test_every_goal_is_about_a_figure_and_has_a_known_comparison(metrics: Path) -> None:
    outcome = result(ending(UNLIKE), metrics)

    assert outcome["goals"] == {name: [sign, goal] for name, (sign, goal) in GOALS.items()}
    assert set(outcome["goals"]) <= set(outcome["figures"])
    assert {sign for sign, _ in outcome["goals"].values()} <= set(COMPARE)


def test_a_device_is_shown_by_its_plan_its_losses_and_its_bytes(metrics: Path) -> None:
    devices = {device["device"]: device for device in result(ending(UNLIKE), metrics)["figures"]["devices"]}

    assert devices["pi"] == {
        "device": "pi", "rank": 2, "held": 4, "bits": 4, "layers": 1, "loss_base": 4.0, "loss_global": 3.0,
        "loss_personal": 1.0, "bytes_up": 1000, "bytes_down": 3000, "peak_bytes": 500 << 20,
        "export_max_logit_diff": 1e-6,
    }  # fmt: skip


def test_the_figures_are_what_the_devices_said(metrics: Path) -> None:
    ended = ending({**UNLIKE, "pi": life("pi", layers=1, personal=3.8)})
    figures = result(ended, metrics)["figures"]

    assert figures["seconds"] == 60.0
    assert figures["different_plans"] == 3
    assert figures["smallest_fall_global"] == 0.25
    assert figures["smallest_fall_personal"] == pytest.approx(0.05)
    assert figures["export_max_logit_diff"] == 1e-6
    assert figures["bytes_ratio"] == round(3 * 4000 / bytes_as_fp32(ended.board), 4)
    assert figures["truncation"] == [0.01, 0.02]


def test_the_goals_are_met_by_unlike_devices_that_all_learned_in_time(metrics: Path) -> None:
    assert result(ending(UNLIKE), metrics)["met"] is True


@pytest.mark.parametrize(
    "ended",
    [
        pytest.param(ending(UNLIKE, failures=("'pi' was killed",)), id="a process failed"),
        pytest.param(ending(UNLIKE, seconds=481.0), id="too slow"),
        pytest.param(ending({**UNLIKE, "pi": life("pi", personal=3.9, layers=1)}), id="one device learned too little"),
        pytest.param(ending({name: life(name) for name in UNLIKE}), id="all devices alike"),
        pytest.param(ending({**UNLIKE, "pi": UNLIKE["pi"][:3]}), id="one device never finished"),
        pytest.param(ending({**UNLIKE, "silent": []}), id="one device never said a word"),
        pytest.param(ending({}), id="nobody"),
    ],
)
def test_the_goals_are_not_met(ended: Ending, metrics: Path) -> None:
    outcome = result(ended, metrics)

    assert outcome["met"] is False
    assert json.loads(json.dumps(outcome)) == outcome


def test_an_export_that_differs_too_much_fails_the_goals(metrics: Path) -> None:
    losses = Losses(base=4.0, merged=3.0, version=2, personal=1.0)
    lives = {
        difference: [
            *life("pi", layers=1),
            said.report("pi", "done", held_out=losses, export_max_logit_diff=difference),
        ]
        for difference in (1e-5, 1e-2)
    }

    assert result(ending({**UNLIKE, "pi": lives[1e-5]}), metrics)["met"] is True
    assert result(ending({**UNLIKE, "pi": lives[1e-2]}), metrics)["met"] is False


def test_onlookers_and_strangers_are_no_devices_of_the_demo(metrics: Path) -> None:
    ended = ending(UNLIKE)
    board = board_of({**UNLIKE, "stranger": [Presence(client="stranger", state="online")]})
    found = result(Ending(board, ended.limits, ended.seconds, ()), metrics)

    assert [device["device"] for device in found["figures"]["devices"]] == sorted(UNLIKE)


def test_a_demo_whose_server_recorded_nothing_has_no_truncation(tmp_path: Path) -> None:
    assert truncations(tmp_path / "metrics.jsonl") == []
    assert result(ending({}), tmp_path / "metrics.jsonl")["figures"]["truncation"] == []


def test_the_last_record_of_a_round_counts(metrics: Path) -> None:
    """A server that was killed after it recorded a merge merges once more."""
    assert truncations(metrics) == [(1, 0.01), (2, 0.02)]
