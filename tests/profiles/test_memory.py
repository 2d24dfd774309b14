"""The predicted peak of a training process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import BaseModelError, ConfigError
from profiles.memory import PARTS, Setting, estimate, saved_bytes_per_token, trained_numbers
from tests.profiles.cards import ALL, ATTENTION, smollm2

MIB = 2**20

SETTINGS = st.builds(
    Setting,
    target_modules=st.sampled_from([ATTENTION, ALL, ("q_proj",)]),
    rank=st.integers(1, 64),
    held=st.integers(64, 128),
    layers_trained=st.integers(1, 29),
    precision=st.sampled_from(["nf4", "int8", "bf16", "fp32"]),
    compute_dtype=st.sampled_from(["bf16", "fp32"]),
    micro_batch=st.integers(1, 8),
    max_length=st.integers(1, 1024),
    gradient_checkpointing=st.booleans(),
    recomputed_layers=st.sampled_from([None, 0, 1]),
    optimizer=st.sampled_from(["adamw", "adamw_8bit"]),
    regained=st.sampled_from([0, 16]),
)

# VmHWM in MiB, as benchmarks/memory_prediction.py found it with the versions that profiles.memory names.
MEASURED = [
    (Setting(ATTENTION, 2, 2, 1, max_length=64), 538),
    (Setting(ATTENTION, 8, 32, 30, max_length=128), 577),
    (Setting(ATTENTION, 8, 16, 30, micro_batch=2), 620),
    (Setting(ATTENTION, 16, 16, 30, max_length=512, gradient_checkpointing=False), 765),
    (Setting(ALL, 8, 32, 30, micro_batch=2, gradient_checkpointing=False), 881),
    (Setting(ATTENTION, 4, 4, 10, max_length=128, micro_batch=4, gradient_checkpointing=False), 631),
    (Setting(ATTENTION, 8, 16, 30, max_length=128, micro_batch=2, compute_dtype="fp32"), 699),
    (Setting(ATTENTION, 8, 32, 30, precision="int8"), 643),
    (Setting(ATTENTION, 8, 16, 30, precision="bf16", micro_batch=4), 798),
    (Setting(ATTENTION, 8, 16, 30, precision="fp32", compute_dtype="fp32", gradient_checkpointing=False), 1134),
]


# The same, of the ways to train: 2 steps, one thread.
MEASURED_WAYS = [
    (Setting(ATTENTION, 8, 32, 30, micro_batch=4, recomputed_layers=30), 680),
    (Setting(ATTENTION, 8, 32, 30, micro_batch=4, recomputed_layers=29), 678),
    (Setting(ATTENTION, 8, 32, 30, micro_batch=4, recomputed_layers=15), 818),
    (Setting(ALL, 64, 64, 30, max_length=64), 941),
    (Setting(ALL, 64, 64, 30, max_length=64, optimizer="adamw_8bit"), 841),
]


@pytest.mark.parametrize(("setting", "measured"), [*MEASURED, *MEASURED_WAYS])
def test_predictions_stay_within_five_percent_of_measured_peaks(setting: Setting, measured: int) -> None:
    assert estimate(smollm2(), setting).total / MIB == pytest.approx(measured, rel=0.05)


@given(setting=SETTINGS)
def test_the_total_is_the_sum_of_parts_and_none_is_negative(setting: Setting) -> None:
    found = estimate(smollm2(), setting)

    assert found.total == sum(found.parts.values())
    assert min(found.parts.values()) >= 0


@given(
    setting=SETTINGS,
    raised=st.sampled_from(["rank", "held", "layers_trained", "micro_batch", "max_length"]),
    pool=st.sampled_from(["host", "gpu", "shared"]),
)
def test_more_of_anything_never_needs_less(setting: Setting, raised: str, pool: str) -> None:
    if raised == "rank":
        # A larger factor may come to have its moments in 8 bits, and then take less than a smaller one.
        setting = replace(setting, optimizer="adamw")
    more = replace(setting, **{raised: getattr(setting, raised) + 1, "held": setting.held + 1})

    assert estimate(smollm2(), more, pool).total >= estimate(smollm2(), setting, pool).total


@given(setting=SETTINGS, pool=st.sampled_from(["host", "gpu", "shared"]))
def test_recomputing_all_or_none_is_what_checkpointing_on_or_off_is(setting: Setting, pool: str) -> None:
    on, off = (replace(setting, gradient_checkpointing=on, recomputed_layers=None) for on in (True, False))

    every = replace(on, recomputed_layers=setting.layers_trained)
    assert estimate(smollm2(), every, pool) == estimate(smollm2(), on, pool)
    assert estimate(smollm2(), replace(on, recomputed_layers=0), pool) == estimate(smollm2(), off, pool)


@given(setting=SETTINGS, pool=st.sampled_from(["host", "gpu", "shared"]))
def test_each_layer_recomputed_saves_memory_but_the_last_one(setting: Setting, pool: str) -> None:
    """The last layer's backward pass comes first: what it keeps is what it would have to recompute at once."""
    on = replace(setting, gradient_checkpointing=True)
    counts = range(setting.layers_trained + 1)
    totals = [estimate(smollm2(), replace(on, recomputed_layers=count), pool).total for count in counts]

    assert totals[:-1] == sorted(totals[:-1], reverse=True)
    assert len(set(totals[:-1])) == len(totals) - 1
    assert totals[-1] > totals[-2]


@given(setting=SETTINGS, regained=st.integers(1, 64))
def test_what_a_4_bit_base_regained_takes_its_factors_in_bfloat16_and_other_bases_regain_nothing(
    setting: Setting, regained: int
) -> None:
    none, some = (estimate(smollm2(), replace(setting, regained=count)) for count in (0, regained))
    a_layer = 2 * (576 + 576) + 2 * (192 + 576) + 3 * (576 + 1536)

    expected = 2 * regained * 30 * a_layer if setting.precision == "nf4" else 0
    assert some.total - none.total == some.base_weights - none.base_weights == expected


def test_8_bit_moments_save_six_bytes_of_each_number_of_a_factor_that_is_large_enough() -> None:
    """As counted in bitsandbytes' own state: 2.26 bytes of moments a number, with those too small left in 32 bits."""
    setting = Setting(ALL, 16, 16, 30)
    plain, small = (estimate(smollm2(), replace(setting, optimizer=name)) for name in ("adamw", "adamw_8bit"))
    numbers = trained_numbers(smollm2(), setting)

    assert plain.trained_adapter == 16 * numbers
    assert small.trained_adapter / numbers - 8 == pytest.approx(2.2565, rel=0.001)
    lowest = replace(setting, rank=2)
    assert estimate(smollm2(), replace(lowest, optimizer="adamw_8bit")) == estimate(smollm2(), lowest)


def test_each_copy_that_a_term_needs_takes_four_bytes_of_a_trained_number() -> None:
    setting = Setting(ALL, 16, 16, 30, optimizer="adamw_8bit")
    totals = [estimate(smollm2(), replace(setting, copies=copies)).total for copies in (0, 1, 2)]

    assert [total - totals[0] for total in totals] == [
        0,
        *(4 * k * trained_numbers(smollm2(), setting) for k in (1, 2)),
    ]
    with pytest.raises(ConfigError, match="no copy of the trained numbers or some"):
        replace(setting, copies=-1)


@given(setting=SETTINGS)
def test_untrained_layers_keep_no_activations(setting: Setting) -> None:
    card = smollm2()
    open_setting = replace(setting, gradient_checkpointing=False)
    deeper = replace(card, num_layers=card.num_layers + 5)

    assert estimate(card, open_setting).activations == estimate(deeper, open_setting).activations


def test_the_bytes_of_a_token_are_those_that_autograd_saves() -> None:
    """12,680 and 16,904 (all modules) in bf16 were counted by saved-tensor hooks, less the angles all layers share."""
    setting = Setting(ATTENTION, 8, 8, 30, max_length=128)

    assert saved_bytes_per_token(smollm2(), setting) == 12_680
    assert saved_bytes_per_token(smollm2(), replace(setting, target_modules=ALL)) == 16_904
    assert saved_bytes_per_token(smollm2(), replace(setting, target_modules=("q_proj", "v_proj"))) == 11_528


def test_four_bit_weights_take_what_they_take_on_disk() -> None:
    """The pre-quantised SmolLM2-135M is a file of 111,879,761 bytes: 4-bit weights and a bf16 embedding."""
    found = estimate(smollm2(), Setting(ATTENTION, 8, 8, 30))

    assert found.base_weights + found.embeddings == pytest.approx(111_879_761, rel=0.01)


def test_modules_that_are_only_held_keep_nothing_for_the_backward_pass() -> None:
    every = Setting(ALL, 8, 8, 30, gradient_checkpointing=False)
    few = replace(every, trained_modules=("q_proj", "v_proj"))

    assert estimate(smollm2(), few).activations < estimate(smollm2(), every).activations
    assert estimate(smollm2(), few).trained_adapter < estimate(smollm2(), every).trained_adapter
    assert estimate(smollm2(), few).held_adapter == estimate(smollm2(), every).held_adapter
    with pytest.raises(ConfigError, match="q_proj"):
        replace(every, trained_modules=("c_attn",))
    with pytest.raises(ConfigError, match="at least one trained module"):
        replace(every, trained_modules=())


def test_every_part_is_explained() -> None:
    assert list(PARTS) == list(estimate(smollm2(), Setting(ATTENTION, 8, 8, 30)).parts)


def test_precisions_order_by_their_bytes() -> None:
    sizes = [
        estimate(smollm2(), Setting(ATTENTION, 8, 8, 30, precision=precision)).base_weights
        for precision in ("nf4", "int8", "bf16", "fp32")
    ]

    assert sizes == sorted(sizes)
    assert sizes[1] / sizes[2] == pytest.approx(0.5, rel=0.01)


def test_chunked_logits_do_not_grow_with_the_batch() -> None:
    small, large = Setting(ATTENTION, 8, 8, 30), Setting(ATTENTION, 8, 8, 30, micro_batch=8)

    assert estimate(smollm2(), small).logits == estimate(smollm2(), large).logits < 8 * 256 * 49152 * 4


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "int3"},
        {"compute_dtype": "fp8"},
        {"optimizer": "sgd"},
        {"recomputed_layers": 31},
        {"recomputed_layers": -1},
        {"rank": 0},
        {"held": 4},
        {"micro_batch": 0},
        {"layers_trained": 0},
    ],
)
def test_a_setting_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(Setting(ATTENTION, 8, 8, 30), **change)


def test_unknown_pools_layers_and_modules_are_refused() -> None:
    with pytest.raises(ConfigError, match="host"):
        estimate(smollm2(), Setting(ATTENTION, 8, 8, 30), "cloud")
    with pytest.raises(ConfigError, match="30 layers"):
        estimate(smollm2(), Setting(ATTENTION, 8, 8, 31))
    with pytest.raises(BaseModelError, match="q_proj"):
        estimate(smollm2(), Setting(("c_attn",), 8, 8, 30))


def test_a_description_names_the_largest_part_first() -> None:
    text = estimate(smollm2(), Setting(ATTENTION, 8, 8, 30)).describe(2)

    assert text.startswith("runtime 399 MiB")
    assert " MiB, " in text
    assert text.count(",") == 1
