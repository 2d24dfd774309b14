"""The number that a plan maximises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from profiles.memory import Setting
from profiles.worth import worth
from tests.profiles.cards import ATTENTION, smollm2

SETTING = Setting(ATTENTION, 4, 8, 10, max_length=128, trained_modules=("q_proj", "v_proj"))


@pytest.mark.parametrize(
    "better",
    [
        {"rank": 8}, {"held": 16}, {"layers_trained": 11}, {"precision": "int8"}, {"precision": "bf16"},
        {"trained_modules": ATTENTION}, {"max_length": 256},
    ],
)  # fmt: skip
def test_more_of_what_learns_is_worth_more(better: dict[str, Any]) -> None:
    assert worth(smollm2(), replace(SETTING, **better)) > worth(smollm2(), SETTING)


@pytest.mark.parametrize("way", [{"micro_batch": 4}, {"gradient_checkpointing": False}])
def test_how_it_is_computed_is_worth_nothing(way: dict[str, Any]) -> None:
    assert worth(smollm2(), replace(SETTING, **way)) == worth(smollm2(), SETTING)
