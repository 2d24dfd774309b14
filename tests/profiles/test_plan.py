"""Choosing what a device does."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import BaseModelError, ConfigError, PlanError
from edge_runtime.lora.adapter import LayerSlot, Slot
from profiles import search
from profiles.device import Gpu
from profiles.memory import estimate
from profiles.plan import Plan, plan, rows, smallest
from profiles.search import Problem
from profiles.terms import Budgets, Overrides, Task
from profiles.worth import worth
from tests.profiles.cards import ALL, ATTENTION, smollm2
from tests.profiles.measured import MEASURED

MIB = 2**20
GIB = 2**30

TASK = Task(ATTENTION, max_rank=16, max_held=32, max_length=256, batch_size=4, steps=24)

TASKS = st.builds(
    Task,
    target_modules=st.sampled_from([ATTENTION, ALL, ("q_proj", "v_proj")]),
    max_rank=st.sampled_from([1, 2, 12, 16, 64]),
    max_held=st.sampled_from([64, 100, 128]),
    max_length=st.sampled_from([16, 128, 256, 1024]),
    batch_size=st.integers(1, 12),
    steps=st.integers(1, 50),
    hold_more=st.booleans(),
)
BUDGETS = st.builds(
    Budgets,
    memory_bytes=st.integers(500 * MIB, 4 * GIB),
    round_seconds=st.none() | st.floats(10, 3000),
    round_bytes=st.none() | st.integers(50_000, 50 * MIB),
)


def planned(memory: int | None, task: Task = TASK, overrides: Overrides | None = None, **budgets: Any) -> Plan:
    """A plan for SmolLM2-135M on a machine with fast bf16."""
    return plan(MEASURED, smollm2(), task, Budgets(memory, **budgets), overrides)


def worth_of(found: Plan, task: Task) -> float:
    return worth(smollm2(), found.setting(task.target_modules))


@settings(max_examples=40, deadline=None)
@given(task=TASKS, budgets=BUDGETS, more=st.integers(0, GIB))
def test_a_larger_budget_never_gives_a_plan_that_is_worth_less(task: Task, budgets: Budgets, more: int) -> None:
    try:
        small = plan(MEASURED, smollm2(), task, budgets)
    except PlanError:
        return
    larger = replace(
        budgets,
        memory_bytes=(budgets.memory_bytes or 0) + more,
        round_seconds=budgets.round_seconds and 2 * budgets.round_seconds,
        round_bytes=budgets.round_bytes and 2 * budgets.round_bytes,
    )

    assert worth_of(plan(MEASURED, smollm2(), task, larger), task) >= worth_of(small, task)


@settings(max_examples=40, deadline=None)
@given(task=TASKS, budgets=BUDGETS)
def test_a_plan_is_within_all_three_budgets_and_within_what_the_fleet_asks_for(task: Task, budgets: Budgets) -> None:
    try:
        found = plan(MEASURED, smollm2(), task, budgets)
    except PlanError:
        return

    assert found.predicted_peak_bytes <= (budgets.memory_bytes or 0)
    assert found.predicted_peak_bytes == estimate(smollm2(), found.setting(task.target_modules)).total
    assert found.predicted_step_seconds is not None
    assert task.steps * found.predicted_step_seconds <= (budgets.round_seconds or float("inf"))
    assert found.predicted_round_bytes <= (budgets.round_bytes or float("inf"))
    assert found.micro_batch * found.gradient_accumulation_steps == task.batch_size
    assert found.rank <= found.held <= task.max_held
    assert found.rank <= task.max_rank
    assert task.hold_more or found.held == found.rank


@settings(max_examples=40, deadline=None)
@given(task=TASKS, budgets=BUDGETS)
def test_no_choice_can_be_raised_alone_within_the_budgets(task: Task, budgets: Budgets) -> None:
    try:
        found = plan(MEASURED, smollm2(), task, budgets)
    except PlanError:
        return

    for said in found.next_better.values():
        assert re.search(r"needs \d+ MiB more|would take \d+ s|would move [\d.]+ MiB", said), said


@settings(max_examples=30, deadline=None)
@given(task=TASKS, budget=st.integers(1, 500 * MIB))
def test_what_is_missing_is_exactly_what_makes_the_smallest_plan_fit(task: Task, budget: int) -> None:
    with pytest.raises(PlanError) as error:
        planned(budget, task)
    stated = re.match(r"(\d+) MiB are missing", str(error.value))
    assert stated
    missing = int(stated.group(1))

    assert planned(budget + missing * MIB, task).predicted_peak_bytes > budget
    with pytest.raises(PlanError):
        planned(budget + (missing - 1) * MIB, task)
    assert smallest(MEASURED, smollm2(), task).total <= budget + missing * MIB


def test_the_search_finds_what_trying_everything_finds() -> None:
    """Layers, micro-batch, how many layers are recomputed, and the optimiser included."""
    card = replace(smollm2(), num_layers=6)
    task = replace(TASK, target_modules=ALL, max_rank=32, max_held=32, max_length=64, batch_size=2)
    budgets = Budgets(memory_bytes=plan(MEASURED, card, task, Budgets(GIB)).predicted_peak_bytes * 98 // 100)
    offered = search.options(MEASURED, card, task, Overrides())
    problem = Problem(MEASURED, card, task, search.limits(MEASURED, budgets), offered)
    everything = (
        search.recomputing(replace(setting, layers_trained=layers, micro_batch=size, optimizer=optimizer), count)
        for setting in search._combinations(problem)
        for layers, size, optimizer in itertools.product(offered.layers, offered.micro_batches, offered.optimizers)
        for count in range(layers + 1)
    )
    fitting = [one for one in everything if search.fits(problem, search.cost(problem, one))]

    found = search.best(problem)

    assert found is not None
    most = max(worth(card, one) for one in fitting)
    assert worth(card, found) == most
    # 8-bit moments are the exception, also here.
    without = [one for one in fitting if worth(card, one) == most and one.optimizer == "adamw"]
    assert found.optimizer == ("adamw" if without else "adamw_8bit")


@settings(max_examples=25, deadline=None)
@given(task=TASKS, budgets=BUDGETS)
def test_8_bit_moments_are_for_what_is_worth_more_and_fits_in_no_other_way(task: Task, budgets: Budgets) -> None:
    try:
        found = plan(MEASURED, smollm2(), task, budgets)
        plain = plan(MEASURED, smollm2(), task, budgets, Overrides(optimizer="adamw"))
    except PlanError:
        return

    if found.optimizer == "adamw_8bit":
        assert worth_of(found, task) > worth_of(plain, task)
    else:
        assert found.setting(task.target_modules) == plain.setting(task.target_modules)


def test_a_budget_exists_in_which_only_8_bit_moments_let_a_plan_fit() -> None:
    task = replace(TASK, target_modules=ALL)
    fixed = Overrides(rank=16, held=16, layers_trained=30, precision="nf4", max_length=256)
    plain = planned(GIB, task, replace(fixed, recomputed_layers=29, micro_batch=1, optimizer="adamw"))
    found = planned(plain.predicted_peak_bytes - MIB, task, fixed)

    assert found.optimizer == "adamw_8bit"
    assert re.search(r"^AdamW needs 1 MiB more", found.reasons["optimizer"])
    assert planned(plain.predicted_peak_bytes, task, fixed).optimizer == "adamw"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_as_few_layers_are_recomputed_as_fit(share: float) -> None:
    fixed = Overrides(rank=8, held=8, layers_trained=30, precision="nf4", max_length=256, micro_batch=1)
    ends = [planned(4 * GIB, overrides=replace(fixed, recomputed_layers=count)) for count in (29, 0)]
    least, most = (one.predicted_peak_bytes for one in ends)
    budget = least + int(share * (most - least))
    found = planned(budget, overrides=fixed)

    assert found.gradient_checkpointing
    assert 0 < found.recomputed_layers < 30
    fewer = planned(4 * GIB, overrides=replace(fixed, recomputed_layers=found.recomputed_layers - 1))
    assert found.predicted_peak_bytes <= budget < fewer.predicted_peak_bytes
    assert f"recomputing {found.recomputed_layers - 1} layer" in found.reasons["recomputed_layers"]
    assert "MiB more" in found.reasons["recomputed_layers"]
    assert planned(most, overrides=fixed).recomputed_layers == 0


def test_checkpointing_that_is_asked_for_recomputes_all_and_a_number_that_many() -> None:
    assert planned(4 * GIB, overrides=Overrides(gradient_checkpointing=True)).recomputed_layers == 30
    assert not planned(4 * GIB, overrides=Overrides(recomputed_layers=0)).gradient_checkpointing
    assert planned(4 * GIB, overrides=Overrides(recomputed_layers=12)).gradient_checkpointing


def test_unlike_devices_get_unlike_plans() -> None:
    least = smallest(MEASURED, smollm2(), TASK).total
    found = [planned(least + more * MIB) for more in (10, 100, 2000)]

    assert len({(plan.rank, plan.held, plan.layers_trained, plan.precision) for plan in found}) == len(found)
    assert worth_of(found[0], TASK) < worth_of(found[1], TASK) < worth_of(found[2], TASK)
    assert (found[0].precision, found[2].precision) == ("nf4", "bf16")
    assert (found[2].rank, found[2].held, found[2].layers_trained) == (16, 32, 30)
    assert not found[2].gradient_checkpointing


def test_the_same_arguments_give_the_same_plan() -> None:
    assert planned(900 * MIB) == planned(900 * MIB)


def test_a_plan_survives_json() -> None:
    found = planned(900 * MIB)

    assert Plan.from_json(json.loads(json.dumps(found.to_json()))) == found
    with pytest.raises(ConfigError, match="surprise"):
        Plan.from_json({**found.to_json(), "surprise": 1})


@pytest.mark.parametrize("more", [5, 50, 200, 4000])
def test_every_choice_has_a_sentence(more: int) -> None:
    found = planned(smallest(MEASURED, smollm2(), TASK).total + more * MIB)

    assert set(found.reasons) == {entry.name for entry in fields(Plan)} - {"reasons", "next_better"}
    assert all(found.reasons.values())
    assert len(rows(found)) == len(found.reasons)


def test_the_next_step_up_is_named_with_what_it_needs() -> None:
    # One byte less than the next plan needs, so that plan is the step that the sentence is about.
    overrides = Overrides(gradient_checkpointing=True, precision="bf16", optimizer="adamw")
    enough = planned(4 * GIB, replace(TASK, batch_size=1), overrides)
    found = planned(enough.predicted_peak_bytes - 1, replace(TASK, batch_size=1), overrides)

    assert any(said.endswith("needs 1 MiB more") for said in found.next_better.values())


def test_a_link_that_carries_little_gets_a_smaller_adapter_and_says_why() -> None:
    wide, narrow = planned(2 * GIB), planned(2 * GIB, round_bytes=MIB)

    assert narrow.predicted_round_bytes <= MIB < wide.predicted_round_bytes
    assert "MiB a round of 1.0 allowed" in narrow.reasons["held"]


def test_a_round_that_must_be_short_gets_a_plan_that_is_fast_enough_and_says_why() -> None:
    unhurried = planned(2 * GIB)
    assert unhurried.predicted_step_seconds is not None
    allowed = 0.5 * TASK.steps * unhurried.predicted_step_seconds
    hurried = planned(2 * GIB, round_seconds=allowed)

    assert hurried.predicted_step_seconds is not None
    assert TASK.steps * hurried.predicted_step_seconds <= allowed
    assert any("s a round of" in said for said in hurried.next_better.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 4), ("held", 16), ("layers_trained", 7), ("precision", "nf4"), ("precision", "int8"),
        ("compute_dtype", "fp32"), ("trained_modules", ("q_proj", "v_proj")), ("max_length", 100),
        ("micro_batch", 2), ("gradient_checkpointing", True), ("threads", 3), ("recomputed_layers", 12),
        ("recomputed_layers", 0), ("optimizer", "adamw_8bit"), ("optimizer", "adamw"),
    ],
)  # fmt: skip
def test_what_somebody_insists_on_is_honoured(name: str, value: Any) -> None:
    found = planned(4 * GIB, overrides=Overrides(**{name: value}))

    assert getattr(found, name) == value
    assert found.reasons[name].startswith("as asked for")


def test_fp32_weights_are_computed_with_in_fp32() -> None:
    assert planned(4 * GIB, overrides=Overrides(precision="fp32")).compute_dtype == "fp32"
    with pytest.raises(ConfigError, match="fp32"):
        planned(4 * GIB, overrides=Overrides(precision="fp32", compute_dtype="bf16"))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("rank", 0, "rank is a whole number of at least 1"), ("rank", -2, "at least 1"), ("rank", 2.5, "whole number"),
        ("rank", 32, "between 1 and 16"), ("held", 64, "between 1 and 32"), ("layers_trained", 31, "between 1 and 30"),
        ("precision", "3-bit", "nf4"), ("precision", "int3", "int8"), ("compute_dtype", "fp16", "bf16"),
        ("micro_batch", 3, "divides the batch"), ("max_length", 512, "between 1 and 256"), ("threads", 0, "at least 1"),
        ("trained_modules", ("gate_proj",), "q_proj"), ("optimizer", "sgd", "adamw_8bit"),
        ("recomputed_layers", -1, "at least 0"), ("recomputed_layers", 31, "between 0 and 30"),
    ],
)  # fmt: skip
def test_a_nonsensical_override_is_refused_in_one_line(name: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        planned(4 * GIB, overrides=Overrides(**{name: value}))

    assert "\n" not in str(error.value)


def test_an_override_that_does_not_fit_is_told_from_a_device_that_is_too_small() -> None:
    budget = smallest(MEASURED, smollm2(), TASK).total + 10 * MIB

    with pytest.raises(PlanError, match=r"rank 16.*as asked for.*without what was asked for, this fits: rank"):
        planned(budget, overrides=Overrides(rank=16, held=32, layers_trained=30))


def test_where_nothing_fits_a_base_that_would_is_named() -> None:
    card = replace(smollm2(), name="large", num_layers=300)

    with pytest.raises(PlanError, match=r"the largest known base that fits is SmolLM2-135M"):
        plan(MEASURED, card, TASK, Budgets(smallest(MEASURED, smollm2(), TASK).total + 20 * MIB))
    with pytest.raises(PlanError, match="no known base fits"):
        planned(100 * MIB)


def test_layers_make_the_slot_that_the_server_knows() -> None:
    found = planned(4 * GIB, overrides=Overrides(layers_trained=5, trained_modules=("q_proj", "v_proj")))

    slot = Slot({name: LayerSlot(*layer) for name, layer in found.layers(smollm2(), ATTENTION).items()})

    assert len(slot.layers) == 30 * 4
    assert len(slot.trained) == 5 * 2
    assert set(slot.held.values()) == {found.held}
    assert slot.layers["model.layers.29.self_attn.v_proj"] == LayerSlot(192, 576, found.held, found.rank)
    assert slot.layers["model.layers.29.self_attn.k_proj"].trained == 0
    assert slot.layers["model.layers.0.self_attn.v_proj"].trained == 0


def test_without_a_budget_the_device_decides() -> None:
    found = plan(replace(MEASURED, memory_bearable_bytes=900 * MIB), smollm2(), TASK)

    assert found.predicted_peak_bytes == planned(900 * MIB).predicted_peak_bytes
    assert "what the device can bear" in found.reasons["predicted_peak_bytes"]


def test_unknown_memory_asks_for_a_budget() -> None:
    reasons = {field: why for field, why in MEASURED.reasons.items() if field != "memory_bearable_bytes"}
    profile = replace(
        MEASURED, reasons=reasons, unreadable={**MEASURED.unreadable, "memory_bearable_bytes": "no /proc"}
    )

    with pytest.raises(PlanError, match=r"no /proc.*budget"):
        plan(profile, smollm2(), TASK)


def test_where_quantised_weights_do_not_train_they_stay_in_the_compute_type() -> None:
    reasons = {**MEASURED.reasons, "four_bit": "the first kernel fails", "eight_bit": "neither does this"}
    broken = replace(MEASURED, four_bit=False, eight_bit=False, reasons=reasons)

    found = plan(broken, smollm2(), TASK, Budgets(4 * GIB))

    assert (found.precision, found.compute_dtype) == ("bf16", "bf16")
    card = Gpu("a card", 16 * GIB, 16 * GIB, "7.0")
    slow = plan(replace(broken, bf16_is_fast=False, kind="cuda", gpus=(card,)), smollm2(), TASK, Budgets(4 * GIB))
    assert (slow.precision, slow.compute_dtype, slow.product_dtype) == ("fp32", "fp32", "fp32")
    with pytest.raises(ConfigError, match="the first kernel fails"):
        plan(broken, smollm2(), TASK, Budgets(4 * GIB), Overrides(precision="nf4"))
    with pytest.raises(ConfigError, match=r"8-bit AdamW.*the first kernel fails"):
        plan(broken, smollm2(), TASK, Budgets(4 * GIB), Overrides(optimizer="adamw_8bit"))
    with pytest.raises(PlanError, match="MiB are missing"):
        plan(broken, smollm2(), TASK, Budgets(500 * MIB))


@pytest.mark.parametrize(("count", "checkpointing"), [(0, True), (3, False)])
def test_two_overrides_that_contradict_each_other_are_refused(count: int, checkpointing: bool) -> None:
    with pytest.raises(ConfigError, match=f"recomputed_layers {count} contradicts"):
        Overrides(recomputed_layers=count, gradient_checkpointing=checkpointing)


def test_more_layers_recomputed_than_trained_are_refused() -> None:
    with pytest.raises(ConfigError, match="recomputed_layers is between 0 and 5 here; found 6"):
        planned(4 * GIB, overrides=Overrides(layers_trained=5, recomputed_layers=6))


def test_unmeasured_rates_leave_the_time_open_and_still_give_a_plan() -> None:
    unreadable = {**MEASURED.unreadable, "memory_bandwidth_gb_s": "not measured"}
    found = plan(replace(MEASURED, memory_bandwidth_gb_s=0.0, unreadable=unreadable), smollm2(), TASK, Budgets(4 * GIB))

    assert found.predicted_step_seconds is None
    assert "not measured" in found.reasons["predicted_step_seconds"]
    assert not found.gradient_checkpointing


@pytest.mark.parametrize(
    "change",
    [
        {"max_rank": 0}, {"target_modules": ()}, {"max_length": 0}, {"batch_size": 0}, {"steps": -1},
        {"bits_up": 0.0}, {"target_modules": ("q_proj", "q_proj")},
    ],
)  # fmt: skip
def test_an_offer_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a plan needs"):
        replace(TASK, **change)


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="round_bytes is positive"):
        Budgets(round_bytes=0)


def test_a_module_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(BaseModelError, match="gate_proj"):
        planned(2 * GIB, replace(TASK, target_modules=("c_attn",)))
