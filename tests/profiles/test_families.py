"""What the plan knows of each family: its sizes, its memory, its bytes on the wire."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edge_runtime.errors import BaseModelError, ConfigError, PlanError
from edge_runtime.lora.adapter import LayerSlot, Slot
from profiles import families
from profiles.memory import Setting, estimate, saved_bytes_per_token, trained_numbers
from profiles.plan import layers, plan
from profiles.speed import seconds_per_step
from profiles.terms import Budgets, Overrides, Task
from profiles.traffic import round_bytes
from tests.profiles.cards import smollm2
from tests.profiles.measured import MEASURED

EVERY = sorted(families.FAMILIES)
RANKED = [name for name in EVERY if families.family(name).ranked]


def setting_of(name: str, rank: int = 4, held: int = 8, trained: int = 10) -> Setting:
    family = families.family(name)
    if not family.ranked:
        rank = held = 1
    if family.modules == "embedding":
        trained = 30
    return Setting(family.examples, rank, held, trained, family=name)


def task_of(name: str) -> Task:
    family = families.family(name)
    most, held = (8, 16) if family.ranked else (1, 1)
    return Task(family.examples, max_rank=most, max_held=held, max_length=128, batch_size=4, steps=8, family=name)


def numbers_of(layer: tuple[int, int, int, int], name: str, rank: int) -> int:
    d_out, d_in, *_ = layer
    return rank * (d_in if families.MARK in name else d_in + d_out)


@pytest.mark.parametrize("name", EVERY)
def test_what_is_trained_and_moved_is_what_the_layers_of_the_plan_have(name: str) -> None:
    card, setting = smollm2(), setting_of(name)
    planned = layers(setting, card)
    trained = sum(numbers_of(layer, key, layer.trained) for key, layer in planned.items())
    held = sum(numbers_of(layer, key, layer.held) for key, layer in planned.items())

    assert trained == trained_numbers(card, setting) > 0
    assert round_bytes(card, replace(task_of(name), bits_up=32.0, bits_down=16.0), setting) == 4 * trained + 2 * held
    assert estimate(card, setting).held_adapter == 4 * held
    assert estimate(card, setting).trained_adapter == 16 * trained
    for key, layer in planned.items():
        Slot({key: LayerSlot(layer.d_out or 16, *layer[1:])})


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("ia3", 30 * (192 + 192 + 1536)),
        ("bitfit", 30 * (576 + 192 + 192 + 576)),
        ("layer_norm", 30 * 2 * 576),
        ("prompt", 8 * 576),
        ("prefix", 30 * 8 * (192 + 192)),
        ("bottleneck", 30 * 2 * 8 * (2 * 576 + 1)),
        ("sparse", 30 * 8 * (2 * 576 + 192 + 576)),
        ("lora", 30 * 8 * (2 * 576 + 192 + 576)),
        ("dora", 30 * (8 * (2 * 576 + 192 + 576) + 576 + 192)),
    ],
)
def test_sizes_are_those_of_the_papers_at_rank_8(name: str, numbers: int) -> None:
    assert trained_numbers(smollm2(), setting_of(name, 8, 8, 30)) == numbers


@pytest.mark.parametrize("name", EVERY)
def test_a_device_plans_within_its_memory_and_its_link(name: str) -> None:
    card, task = smollm2(), task_of(name)
    free = plan(MEASURED, card, task)
    assert free.family == name
    assert seconds_per_step(MEASURED, card, free.setting(task.target_modules)) > 0
    tight = (
        plan(MEASURED, card, task, Budgets(round_bytes=max(1, int(0.7 * free.predicted_round_bytes))))
        if (name in RANKED)
        else free
    )
    assert tight.predicted_round_bytes <= free.predicted_round_bytes
    with pytest.raises(PlanError):
        plan(MEASURED, card, task, Budgets(memory_bytes=1 << 20))


def test_virtual_tokens_take_the_memory_of_tokens() -> None:
    for name in ("prompt", "prefix"):
        few, many = (setting_of(name, 4, held) for held in (4, 40))
        assert many.tokens - few.tokens == 36
        assert estimate(smollm2(), many).activations > estimate(smollm2(), few).activations


def test_what_is_before_the_first_layer_is_trained_through_all_of_them() -> None:
    assert plan(MEASURED, smollm2(), task_of("prompt")).layers_trained == 30
    with pytest.raises(ConfigError, match="layers_trained is between 30 and 30"):
        plan(MEASURED, smollm2(), task_of("prompt"), None, Overrides(layers_trained=3))


def test_families_without_a_rank_refuse_one() -> None:
    with pytest.raises(ConfigError, match="rank is between 1 and 1"):
        plan(MEASURED, smollm2(), task_of("ia3"), None, Overrides(rank=4))


def test_a_family_that_keeps_no_input_keeps_less_of_a_token() -> None:
    lora, bias = (Setting(("q_proj", "down_proj"), 1, 1, 30, family=name) for name in ("lora", "bitfit"))
    assert saved_bytes_per_token(smollm2(), lora) - saved_bytes_per_token(smollm2(), bias) == 2 * (576 + 1536)


def test_a_mask_has_at_most_half_of_a_weight() -> None:
    card = smollm2()
    (piece,) = families.pieces(card, "sparse", "k_proj")
    assert piece.rows(10_000) * piece.width <= 192 * 576 // 2
    assert piece.rows(4) == 4


@pytest.mark.parametrize(
    ("name", "module"), [("layer_norm", "q_proj"), ("ia3", "input_layernorm"), ("prompt", "q_proj")]
)
def test_a_target_of_the_wrong_kind_is_an_error_that_lists_the_right_ones(name: str, module: str) -> None:
    with pytest.raises(BaseModelError):
        families.pieces(smollm2(), name, module)
    with pytest.raises(ConfigError, match="lora"):
        families.family("lorra")
