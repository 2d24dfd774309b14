"""A Directive says what this round asks, at the rate that is left of the fleet's."""

from __future__ import annotations

from typing import get_args

import pytest

from edge_runtime import ways
from edge_runtime.config import Training
from edge_runtime.errors import ConfigError
from edge_runtime.schedule import AFTERWARDS, SCHEDULES
from edge_runtime.trainer import PersonalSpec
from edge_runtime.wire.messages import Directive
from server import aggregators
from server.directing import directive_of
from server.state import State
from tests.runtime.turns import fleet_config

ROUNDS, RATE = 8, 0.004


def asked(round_number: int, schedule: str, phase: str = "train", *others: str) -> Directive:
    config = fleet_config(
        f"rounds.num_rounds={ROUNDS}", f"training.learning_rate={RATE}", f"training.fleet_schedule={schedule}", *others
    )
    state = State.model_validate({"run": "r", "phase": phase, "round": round_number, "version": round_number - 1})
    return directive_of(config, state, (), rank=4, method=aggregators.build("increment"))


def rates(schedule: str) -> list[float]:
    return [asked(number, schedule).training.learning_rate for number in range(1, ROUNDS + 1)]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_falls_from_all_of_it_in_the_first_round_and_is_never_zero(schedule: str) -> None:
    found = rates(schedule)
    assert found[0] == RATE
    assert found == sorted(found, reverse=True)
    assert 0 < found[-1] <= RATE / ROUNDS


def test_a_straight_line_loses_as_much_in_each_round() -> None:
    assert rates("linear") == pytest.approx([RATE * (1 - done / ROUNDS) for done in range(ROUNDS)])


def test_without_a_schedule_all_rounds_have_the_same_rate() -> None:
    assert set(rates("constant")) == {RATE}


def test_a_round_beyond_the_last_one_trains_as_the_last_one_does() -> None:
    assert asked(ROUNDS + 3, "linear").training == asked(ROUNDS, "linear").training


@pytest.mark.parametrize("phase", ["train", "finish"])
@pytest.mark.parametrize(
    ("schedule", "others", "share"),
    [
        ("constant", (), 1.0),
        ("linear", (), AFTERWARDS),
        ("cosine", (), AFTERWARDS),
        ("constant", ("personal.rate_share=0.5",), 0.5),
        ("linear", ("personal.rate_share=1",), 1.0),
    ],
)
def test_a_personal_adapter_is_made_at_a_share_of_the_whole_rate_in_every_round(
    phase: str, schedule: str, others: tuple[str, ...], share: float
) -> None:
    directive = asked(ROUNDS, schedule, phase, *others)
    spec = ways.asked(directive, ways.Own())
    assert ways.training_of(spec, directive, 5, "ab").learning_rate == share * RATE


def test_a_server_that_names_no_personal_rate_leaves_that_of_the_round() -> None:
    directive = asked(ROUNDS, "linear").model_copy(update={"personal": PersonalSpec()})
    assert ways.training_of(directive.personal, directive, 5, "ab").learning_rate == directive.training.learning_rate


@pytest.mark.parametrize("share", ["0", "1.5", "-1", "nan"])
def test_a_share_is_more_than_nothing_and_at_most_all(share: str) -> None:
    with pytest.raises(ConfigError, match=r"personal\.rate_share"):
        asked(1, "linear", "train", f"personal.rate_share={share}")


def test_the_configuration_knows_every_schedule_by_name() -> None:
    assert set(get_args(Training.model_fields["fleet_schedule"].annotation)) == set(SCHEDULES)
