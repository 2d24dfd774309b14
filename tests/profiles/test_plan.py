"""Choosing what a device does."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import BaseModelError, ConfigError, PlanError
from edge_runtime.lora.adapter import LayerSlot, Slot
from profiles.catalogue import device
from profiles.memory import estimate
from profiles.plan import Budgets, Plan, plan, rows
from tests.profiles.cards import ALL, ATTENTION, smollm2

MIB = 2**20
GIB = 2**30

# A quiet machine with fast bf16 and plenty of memory: every budget below is the owner's.
DEVICE = replace(device("laptop-x86"), bf16_is_fast=True, memory_bearable_bytes=64 * GIB)


def planned(budget: int | None, **changes: Any) -> Plan:
    """A plan for SmolLM2-135M with the fleet's usual offer."""
    arguments: dict[str, Any] = {
        "target_modules": ATTENTION,
        "rank_choices": (4, 8, 16),
        "held_limit": 32,
        "max_length": 256,
        "batch_size": 4,
        **changes,
    }
    return plan(DEVICE, smollm2(), budgets=Budgets(budget), **arguments)


OFFERS = st.fixed_dictionaries(
    {
        "target_modules": st.sampled_from([ATTENTION, ALL, ("q_proj", "v_proj")]),
        "rank_choices": st.lists(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), min_size=1, unique=True).map(tuple),
        "held_limit": st.sampled_from([64, 100, 128]),
        "max_length": st.sampled_from([16, 128, 256, 1024]),
        "batch_size": st.integers(1, 12),
    }
)
BUDGETS = st.integers(650 * MIB, 4 * GIB)


@settings(max_examples=60, deadline=None)
@given(offer=OFFERS, budget=BUDGETS, more=st.integers(0, GIB))
def test_a_larger_budget_never_gives_a_smaller_plan(offer: dict[str, Any], budget: int, more: int) -> None:
    try:
        small = planned(budget, **offer)
    except PlanError:
        return
    large = planned(budget + more, **offer)

    assert large.layers_trained >= small.layers_trained
    assert large.rank >= small.rank
    assert large.held >= small.held
    assert large.micro_batch >= small.micro_batch
    whole = small.layers_trained == smollm2().num_layers and small.held > min(offer["rank_choices"])
    assert not (whole and large.gradient_checkpointing and not small.gradient_checkpointing)


@settings(max_examples=60, deadline=None)
@given(offer=OFFERS, budget=BUDGETS)
def test_the_predicted_peak_never_exceeds_the_budget(offer: dict[str, Any], budget: int) -> None:
    try:
        found = planned(budget, **offer)
    except PlanError:
        return

    assert found.predicted_peak_bytes <= budget
    assert found.predicted_peak_bytes == estimate(smollm2(), found.setting(offer["target_modules"])).total
    assert found.micro_batch * found.gradient_accumulation_steps == offer["batch_size"]
    assert found.rank in offer["rank_choices"]
    assert found.rank <= found.held <= offer["held_limit"]


@settings(max_examples=30, deadline=None)
@given(offer=OFFERS, budget=st.integers(0, 700 * MIB))
def test_what_is_missing_is_exactly_what_makes_the_smallest_plan_fit(offer: dict[str, Any], budget: int) -> None:
    try:
        planned(budget, **offer)
    except PlanError as error:
        stated = re.match(r"(\d+) MiB are missing", str(error))
    else:
        return
    assert stated
    missing = int(stated.group(1))

    assert planned(budget + missing * MIB, **offer).predicted_peak_bytes > budget
    with pytest.raises(PlanError):
        planned(budget + (missing - 1) * MIB, **offer)


def test_three_unlike_devices_get_three_unlike_plans() -> None:
    found = [planned(int(budget * GIB)) for budget in (0.75, 0.82, 2)]

    assert len({(plan.rank, plan.held, plan.layers_trained, plan.micro_batch) for plan in found}) == len(found)
    assert found[0].layers_trained < found[2].layers_trained
    assert (found[2].rank, found[2].held, found[2].gradient_checkpointing) == (16, 32, False)


def test_a_very_small_device_trains_the_last_layers() -> None:
    found = planned(720 * MIB)

    assert 0 < found.layers_trained < 30
    assert found.rank == 4


def test_long_sequences_raise_the_rank_before_they_give_up_checkpointing() -> None:
    found = planned(1024 * MIB, max_length=1024)

    assert found.gradient_checkpointing
    assert found.rank == 16


def test_the_same_arguments_give_the_same_plan() -> None:
    assert planned(900 * MIB) == planned(900 * MIB)


def test_a_plan_survives_json() -> None:
    found = planned(900 * MIB)

    assert Plan.from_json(json.loads(json.dumps(found.to_json()))) == found
    with pytest.raises(ConfigError, match="surprise"):
        Plan.from_json({**found.to_json(), "surprise": 1})


@pytest.mark.parametrize("budget", [720, 830, 900, 1200, 4000])
def test_every_choice_has_a_sentence(budget: int) -> None:
    found = planned(budget * MIB)

    assert set(found.reasons) == {entry.name for entry in fields(Plan)} - {"reasons"}
    assert all(found.reasons.values())
    assert len(rows(found)) == len(found.reasons)


def test_the_next_step_up_is_named_with_what_it_needs() -> None:
    # One byte less than the next plan needs, so that plan is the step that the sentence is about.
    better = planned(4 * GIB)
    budget = better.predicted_peak_bytes - 1
    found = planned(budget)

    assert found.micro_batch < better.micro_batch
    assert re.search(rf"needs {better.predicted_peak_bytes / MIB:.0f} MiB of \d+ MiB", found.reasons["micro_batch"])


def test_layers_make_the_slot_that_the_server_knows() -> None:
    found = planned(720 * MIB)

    slot = Slot({name: LayerSlot(*layer) for name, layer in found.layers(smollm2(), ATTENTION).items()})

    assert len(slot.layers) == 30 * 4
    assert len(slot.trained) == found.layers_trained * 4
    assert set(slot.held.values()) == {found.held}
    assert slot.layers["model.layers.29.self_attn.k_proj"] == LayerSlot(192, 576, found.held, found.rank)
    assert slot.layers["model.layers.0.self_attn.k_proj"].trained == 0


def test_without_a_budget_the_device_decides() -> None:
    profile = replace(DEVICE, memory_bearable_bytes=900 * MIB)

    by_device = plan(
        profile,
        smollm2(),
        target_modules=ATTENTION,
        rank_choices=(4, 8, 16),
        held_limit=32,
        max_length=256,
        batch_size=4,
    )

    assert by_device.predicted_peak_bytes == planned(900 * MIB).predicted_peak_bytes
    assert "what the device can bear" in by_device.reasons["predicted_peak_bytes"]


def test_unknown_memory_asks_for_a_budget() -> None:
    reasons = {field: why for field, why in DEVICE.reasons.items() if field != "memory_bearable_bytes"}
    profile = replace(DEVICE, reasons=reasons, unreadable={**DEVICE.unreadable, "memory_bearable_bytes": "no /proc"})

    with pytest.raises(PlanError, match=r"no /proc.*budget"):
        plan(
            profile,
            smollm2(),
            target_modules=ATTENTION,
            rank_choices=(4,),
            held_limit=4,
            max_length=64,
            batch_size=1,
        )


def test_where_4_bit_does_not_work_weights_stay_in_the_compute_type() -> None:
    offer: dict[str, Any] = {
        "target_modules": ATTENTION,
        "rank_choices": (4,),
        "held_limit": 4,
        "max_length": 64,
        "batch_size": 1,
    }
    broken = replace(DEVICE, four_bit=False, reasons={**DEVICE.reasons, "four_bit": "the first kernel fails"})

    found = plan(broken, smollm2(), **offer)

    assert (found.precision, found.compute_dtype) == ("bf16", "bf16")
    assert found.reasons["precision"] == "the first kernel fails"
    slow = plan(replace(broken, bf16_is_fast=False), smollm2(), **offer)
    assert (slow.precision, slow.compute_dtype) == ("fp32", "fp32")
    assert plan(broken, smollm2(), precision="nf4", **offer).precision == "nf4"


@pytest.mark.parametrize(
    "change",
    [{"rank_choices": ()}, {"rank_choices": (64,)}, {"target_modules": ()}, {"max_length": 0}, {"batch_size": 0}],
)
def test_an_offer_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a plan needs"):
        planned(2 * GIB, **change)


def test_unknown_precisions_and_modules_are_refused() -> None:
    with pytest.raises(ConfigError, match="nf4"):
        planned(2 * GIB, precision="int3")
    with pytest.raises(BaseModelError, match="gate_proj"):
        planned(2 * GIB, target_modules=("c_attn",))
