"""A plan in words, and what an owner's section makes of it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from edge_runtime.config import Device
from edge_runtime.errors import ConfigError
from edge_runtime.train.planning import choose, in_words, owner_of, shared, slot_of
from edge_runtime.trainer import AdapterSpec, Training
from profiles.memory import TRAINED_BYTES
from profiles.terms import Overrides
from tests.profiles.cards import ATTENTION, smollm2
from tests.profiles.measured import MEASURED

SPEC = AdapterSpec(
    family="lora", target_modules=ATTENTION, scaling=2.0, max_rank=8, max_held=16, hold_more=True, max_length=256
)
TRAINING = Training(
    max_steps=3, learning_rate=5e-3, batch_size=2, warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, seed=7
)


def words(**chosen: Any) -> str:
    owner = owner_of(Device(**chosen))
    return in_words(choose(MEASURED, smollm2(), SPEC, TRAINING, owner, None), smollm2(), SPEC)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"recomputed_layers": 12}, "tokens, checkpointing 12 of 30 layers, ≤"),
        ({"recomputed_layers": 3, "layers_trained": 5}, "tokens, checkpointing 3 of 5 layers, ≤"),
        ({"gradient_checkpointing": True}, "tokens, checkpointing, ≤"),
        ({"recomputed_layers": 0}, "tokens, ≤"),
        ({"gradient_checkpointing": True, "optimizer": "adamw_8bit"}, "tokens, checkpointing, 8-bit AdamW, ≤"),
        ({}, "tokens, ≤"),
    ],
)
def test_checkpointing_and_the_optimiser_are_said(chosen: dict[str, Any], said: str) -> None:
    assert said in words(**chosen)


def test_a_leaner_codec_leaves_room_for_more_directions_in_the_bytes_of_a_round() -> None:
    owner = owner_of(Device(round_bytes=1_500_000))
    ranks = [
        choose(MEASURED, smollm2(), SPEC.model_copy(update={"bits_up": bits}), TRAINING, owner, None).rank
        for bits in (32.0, 8.0, 1.0)
    ]

    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1]


def test_a_plan_leaves_room_for_what_holds_a_device_near_its_fleet() -> None:
    """The correction keeps a copy of the trained numbers; the proximal term has one already, but on a card."""
    owner = owner_of(Device(rank=8, held=16))

    def copies(**asked: float) -> float:
        plans = [
            choose(MEASURED, smollm2(), SPEC, TRAINING.model_copy(update=terms), owner, None) for terms in ({}, asked)
        ]
        peaks = [plan.predicted_peak_bytes for plan in plans]
        numbers = 8 * smollm2().num_layers * smollm2().rank_parameters(ATTENTION)
        return (peaks[1] - peaks[0]) / (4 * numbers)

    assert copies(proximal=0.1) == 0
    assert copies(correction=0.1, proximal=0.1) == pytest.approx(1)


def test_a_plan_leaves_room_for_what_its_base_regained() -> None:
    owner = owner_of(Device(rank=8, held=16, precision="nf4"))
    plans = [
        choose(MEASURED, smollm2(), SPEC.model_copy(update={"regained": count}), TRAINING, owner, None)
        for count in (0, 16)
    ]

    sums = sum(d_out + d_in for d_out, d_in in smollm2().projections.values())
    assert plans[1].predicted_peak_bytes - plans[0].predicted_peak_bytes == 2 * 16 * 30 * sums


def test_where_ranks_are_equal_a_device_trains_the_fleets_or_says_what_would_work() -> None:
    equal = SPEC.model_copy(update={"equal_ranks": True, "hold_more": False})
    found = choose(MEASURED, smollm2(), equal, TRAINING, owner_of(Device()), None)
    assert (found.rank, found.held) == (8, 8)
    assert choose(MEASURED, smollm2(), equal, TRAINING, owner_of(Device(rank=8)), None).rank == 8
    with pytest.raises(ConfigError, match=r"trains rank 8; found \[device\] rank 4; leave it out, or .*increment"):
        choose(MEASURED, smollm2(), equal, TRAINING, owner_of(Device(rank=4)), None)


def test_a_frozen_adapter_is_held_by_every_layer_and_counted_in_the_plans_memory() -> None:
    """And a layer that is narrower than it holds as much as it has."""
    plain = SPEC.model_copy(update={"hold_more": False, "max_held": 8})
    beside = plain.model_copy(update={"max_held": 8 + 300, "beside": 300})
    one, other = (
        choose(MEASURED, smollm2(), spec, TRAINING, owner_of(Device(rank=4)), None) for spec in (plain, beside)
    )
    numbers = 300 * smollm2().num_layers * smollm2().rank_parameters(ATTENTION)
    assert (one.held, other.held) == (4, 304)
    assert other.predicted_peak_bytes - one.predicted_peak_bytes >= 4 * numbers
    for layer in slot_of(other, smollm2(), beside).layers.values():
        assert layer.held == min(300, layer.d_out, layer.d_in) + 4
        assert layer.trained == 4


def test_directions_of_the_devices_own_are_planned_for_and_no_part_of_what_it_says() -> None:
    """Of layers that it does not train, it has none."""
    spec = SPEC.model_copy(update={"equal_ranks": True, "hold_more": False, "max_held": 8, "own": 3})
    found = choose(MEASURED, smollm2(), spec, TRAINING, owner_of(Device(layers_trained=5)), None)
    slot = slot_of(found, smollm2(), spec)
    assert found.rank == 11
    said = shared(slot, spec)
    for name, layer in slot.layers.items():
        trained = int(name.split(".")[2]) >= smollm2().num_layers - 5
        assert (layer.held, layer.trained) == ((11, 11) if trained else (8, 0))
        assert (said.layers[name].held, said.layers[name].trained) == ((8, 8) if trained else (8, 0))


def test_an_owner_may_insist_on_every_choice_of_a_plan() -> None:
    assert {entry.name for entry in fields(Overrides)} <= set(Device.model_fields)


@pytest.mark.torch
def test_the_plan_and_the_loop_know_the_same_optimisers() -> None:
    pytest.importorskip("torch")
    from edge_runtime.train import optimizer  # noqa: PLC0415 - after the check that torch is there
    from profiles import explain, memory, speed  # noqa: PLC0415 - as above

    known = list(optimizer.OPTIMIZERS)
    assert known == list(TRAINED_BYTES) == list(speed.UPDATE_BYTES) == list(explain.OPTIMIZERS)
    assert memory.LEAST_8BIT == optimizer.LEAST_8BIT
