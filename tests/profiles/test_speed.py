"""The predicted time of a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError
from profiles.catalogue import device
from profiles.memory import Setting
from profiles.speed import operations, seconds_per_step
from tests.profiles.cards import ATTENTION, smollm2

SETTING = Setting(ATTENTION, 8, 8, 30, max_length=128)


def test_a_faster_device_takes_less_time() -> None:
    slow, fast = device("raspberry-pi-4"), device("raspberry-pi-5")
    setting = replace(SETTING, compute_dtype="fp32")

    assert seconds_per_step(fast, smollm2(), setting) < seconds_per_step(slow, smollm2(), setting)


def test_checkpointing_costs_a_quarter_to_a_half() -> None:
    with_it = operations(smollm2(), SETTING)
    without = operations(smollm2(), replace(SETTING, gradient_checkpointing=False))

    assert 1.25 <= with_it / without <= 1.5


def test_training_fewer_layers_takes_less_time() -> None:
    profile = device("jetson-orin-nano")

    last = seconds_per_step(profile, smollm2(), replace(SETTING, layers_trained=5))

    assert last < seconds_per_step(profile, smollm2(), SETTING)


@given(steps=st.integers(1, 64))
def test_accumulation_multiplies(steps: int) -> None:
    profile = device("desktop-gpu")

    one = seconds_per_step(profile, smollm2(), SETTING)

    assert seconds_per_step(profile, smollm2(), SETTING, steps) == pytest.approx(steps * one)


def test_the_products_are_at_least_two_per_weight_and_token_each_way() -> None:
    card = smollm2()

    assert operations(card, replace(SETTING, gradient_checkpointing=False)) >= 4 * 128 * card.linear_parameters


def test_a_rate_that_nobody_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="bf16"):
        seconds_per_step(device("raspberry-pi-5"), smollm2(), SETTING)
