"""The predicted time of a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError
from profiles.catalogue import device
from profiles.memory import Setting
from profiles.speed import PARTS, operations, parts, seconds_per_step, shapes
from tests.profiles.cards import ALL, ATTENTION, smollm2
from tests.profiles.measured import MEASURED

SETTING = Setting(ATTENTION, 8, 8, 30, max_length=128)


def test_a_faster_device_takes_less_time() -> None:
    slow, fast = device("raspberry-pi-4"), device("raspberry-pi-5")
    setting = replace(SETTING, compute_dtype="fp32")

    assert seconds_per_step(fast, smollm2(), setting) < seconds_per_step(slow, smollm2(), setting)


def test_checkpointing_costs_a_quarter_to_a_half() -> None:
    with_it = seconds_per_step(MEASURED, smollm2(), SETTING)
    without = seconds_per_step(MEASURED, smollm2(), replace(SETTING, gradient_checkpointing=False))

    assert 1.25 <= with_it / without <= 1.5


def test_training_fewer_layers_takes_less_time() -> None:
    profile = MEASURED

    last = seconds_per_step(profile, smollm2(), replace(SETTING, layers_trained=5))

    assert last < seconds_per_step(profile, smollm2(), SETTING)


@given(steps=st.integers(1, 64))
def test_accumulation_multiplies_the_passes_and_not_the_update(steps: int) -> None:
    one, many = (parts(MEASURED, smollm2(), SETTING, count) for count in (1, steps))

    assert many.pop("optimizer") == one.pop("optimizer") > 0
    assert many == pytest.approx({name: steps * seconds for name, seconds in one.items()})
    assert seconds_per_step(MEASURED, smollm2(), SETTING, steps) == sum(
        parts(MEASURED, smollm2(), SETTING, steps).values()
    )


def test_what_a_4_bit_base_regained_takes_time_and_other_bases_regain_nothing() -> None:
    def ratio(precision: str) -> float:
        none, some = (replace(SETTING, precision=precision, regained=count) for count in (0, 16))
        return seconds_per_step(MEASURED, smollm2(), some) / seconds_per_step(MEASURED, smollm2(), none)

    assert 1.01 < ratio("nf4") < 1.3
    assert ratio("int8") == ratio("bf16") == 1


@given(count=st.integers(0, 29))
def test_each_layer_that_is_recomputed_costs_one_pass_over_it(count: int) -> None:
    none, one, fewer, more, whole = (
        seconds_per_step(MEASURED, smollm2(), replace(SETTING, recomputed_layers=layers))
        for layers in (0, 1, count, count + 1, 30)
    )

    assert one > none
    assert more - fewer == pytest.approx(one - none)
    assert whole == seconds_per_step(MEASURED, smollm2(), SETTING)
    assert none == seconds_per_step(MEASURED, smollm2(), replace(SETTING, gradient_checkpointing=False))


def test_an_update_of_8_bit_moments_takes_a_tenth_of_a_second_for_millions_of_numbers() -> None:
    """0.14 s for 4.9 million where memory moves 41.6 GB/s; the fused update of plain moments 0.006 s."""
    profile = replace(MEASURED, memory_bandwidth_gb_s=41.6)
    every = replace(SETTING, target_modules=ALL, rank=16, held=16)
    plain, eight_bit = (
        parts(profile, smollm2(), replace(every, optimizer=name))["optimizer"] for name in ("adamw", "adamw_8bit")
    )

    assert plain == pytest.approx(0.0061, rel=0.01)
    assert eight_bit == pytest.approx(0.1375, rel=0.01)


def test_the_products_are_at_least_two_per_weight_and_token_each_way() -> None:
    card = smollm2()

    open_setting = replace(SETTING, gradient_checkpointing=False)
    assert operations(card, open_setting)["dense"] >= 4 * 128 * card.linear_parameters


def test_every_part_is_explained_and_they_add_up() -> None:
    found = parts(MEASURED, smollm2(), SETTING)

    assert list(found) == list(PARTS)
    assert sum(found.values()) == seconds_per_step(MEASURED, smollm2(), SETTING)


@pytest.mark.parametrize("rate", ["gemm_bf16_gflops", "nf4_gweights_s", "memory_bandwidth_gb_s"])
def test_a_faster_rate_never_makes_a_step_slower(rate: str) -> None:
    faster = replace(MEASURED, **{rate: 2 * getattr(MEASURED, rate)})

    assert seconds_per_step(faster, smollm2(), SETTING) < seconds_per_step(MEASURED, smollm2(), SETTING)


def test_the_probe_measures_each_shape_of_the_model_once() -> None:
    assert shapes(smollm2()) == ((128, 576, 192), (128, 576, 576), (128, 576, 1536), (128, 1536, 576))


def test_a_rate_that_nobody_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="bf16"):
        seconds_per_step(device("raspberry-pi-5"), smollm2(), SETTING)
