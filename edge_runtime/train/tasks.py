"""From a plan and what a round asks for to the task of the training loop, and what two plans have in common."""

from __future__ import annotations

from edge_runtime.errors import RoundError, unknown_name
from edge_runtime.schedule import SCHEDULES
from edge_runtime.train.loop import LocalTask
from edge_runtime.trainer import AdapterSpec, Training
from profiles.families import FAMILIES
from profiles.plan import Plan


def same_numbers(chosen: Plan) -> tuple[object, ...]:
    """What two plans must share for a round to go on from one to the other: what is computed, not how it is cut."""
    return (chosen.precision, chosen.compute_dtype, chosen.product_dtype, chosen.max_length)


def same_model(one: Plan, other: Plan) -> bool:
    """Whether a model that was loaded for one plan serves the other."""
    return (same_numbers(one), one.threads) == (same_numbers(other), other.threads)


def rate_of(training: Training, rank: int, spec: AdapterSpec) -> float:
    """The largest learning rate of a device of that rank.

    Adam moves every number of a factor by as much as the rate, whatever their gradients are. The rows of `a` are
    orthonormal but for their scale, so a step moves the product of r directions by the root of r times that, and a
    device of rank 2 a quarter as far as one of rank 32. Whoever trains fewer directions may have a larger rate.
    """
    if not FAMILIES[spec.family].paired:
        return training.learning_rate
    return float(training.learning_rate * (max(1.0, spec.max_rank / rank)) ** training.rate_exponent)


def task_of(training: Training, round_number: int, chosen: Plan, spec: AdapterSpec) -> LocalTask:
    """One round of a plan.

    Raises:
        RoundError: the fleet asks for a schedule that this version does not know.
    """
    if training.schedule not in SCHEDULES:
        raise RoundError(unknown_name("schedule", training.schedule, SCHEDULES) + "; update this device")
    virtual = chosen.held if FAMILIES[spec.family].virtual else 0
    return LocalTask(
        steps=training.max_steps,
        learning_rate=rate_of(training, chosen.rank, spec),
        pack_tokens=chosen.micro_batch * (chosen.max_length + virtual),
        micro_batch=chosen.micro_batch,
        gradient_accumulation_steps=-(-training.batch_size // chosen.micro_batch),
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        # Another order of the examples in each round, the same in each repetition of the run.
        seed=training.seed * 10_007 + round_number,
        gradient_checkpointing=chosen.gradient_checkpointing,
        recomputed_layers=chosen.recomputed_layers,
        schedule=training.schedule,
        optimizer=chosen.optimizer,
        lora_plus_ratio=training.lora_plus_ratio,
        family=spec.family,
        virtual_tokens=virtual,
        factors=training.factors,
    )
