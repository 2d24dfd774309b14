"""From what a device is and what a model needs to what the device will do: the plan, with a sentence for each choice.

`search` finds the setting that is worth most within the budgets of memory, time and bytes; `explain` says why each
choice stands where it stands, and what the next better one would need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from edge_runtime.errors import PlanError
from profiles import explain, families, search
from profiles.card import ModelCard
from profiles.device import DeviceProfile, Row, shown
from profiles.memory import MemoryEstimate, Setting, estimate
from profiles.records import checked
from profiles.search import Problem
from profiles.speed import measured, seconds_per_step
from profiles.terms import Budgets, Overrides, Task


class PlannedLayer(NamedTuple):
    """What the plan means for one layer: the arguments of `edge_runtime.lora.adapter.LayerSlot`, in its order."""

    d_out: int
    d_in: int
    held: int
    trained: int


@dataclass(frozen=True)
class Plan:
    """How this device trains this model.

    Attributes:
        rank: directions trained in each trained module of each trained layer.
        held: directions of the global adapter held in each target of every layer.
        layers_trained: the last so many layers are trained.
        trained_modules: suffixes of the modules that are trained; all targets are held.
        precision: of the base's linear weights: nf4, int8, bf16, fp16 or fp32.
        compute_dtype: of activations: bf16 or fp32.
        product_dtype: of the products of linear layers: bf16 or fp32.
        micro_batch: sequences per forward pass.
        gradient_accumulation_steps: forward passes per optimiser step.
        max_length: tokens per sequence.
        gradient_checkpointing: recompute trained layers in the backward pass.
        recomputed_layers: so many of them, the first ones; the others keep their activations.
        optimizer: adamw or adamw_8bit.
        threads: of torch.
        family: of the adapter.
        predicted_peak_bytes: of the training process.
        predicted_step_seconds: of one optimiser step; None where the device's rates were not measured.
        predicted_round_bytes: what a round moves, up and down, before compression.
        reasons: field → one sentence.
        next_better: choice → what raising it by one step would need.
    """

    rank: int
    held: int
    layers_trained: int
    trained_modules: tuple[str, ...]
    precision: str
    compute_dtype: str
    product_dtype: str
    micro_batch: int
    gradient_accumulation_steps: int
    max_length: int
    gradient_checkpointing: bool
    recomputed_layers: int
    optimizer: str
    threads: int
    family: str
    predicted_peak_bytes: int
    predicted_step_seconds: float | None
    predicted_round_bytes: int
    reasons: Mapping[str, str]
    next_better: Mapping[str, str]

    def layers(self, card: ModelCard, target_modules: Sequence[str]) -> dict[str, PlannedLayer]:
        """What the plan means for each layer; see `layers`.

        Raises:
            BaseModelError: a target module that the model does not have.
        """
        return layers(self.setting(target_modules), card)

    def setting(self, target_modules: Sequence[str]) -> Setting:
        """What the memory and speed predictions take."""
        shared = {entry.name for entry in fields(Setting)} & {entry.name for entry in fields(self)}
        return Setting(target_modules=tuple(target_modules), **{name: getattr(self, name) for name in shared})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `from_json` restores an equal plan."""
        return {**asdict(self), "trained_modules": list(self.trained_modules)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            ConfigError: keys are missing or unknown.
        """
        values = dict(checked("plan", data, (entry.name for entry in fields(cls))))
        return cls(**{**values, "trained_modules": tuple(values["trained_modules"])})


def layers(setting: Setting, card: ModelCard) -> dict[str, PlannedLayer]:
    """Layer name → what is held and trained there: held in every layer, trained in the last `layers_trained`.

    How many rows a tensor has that has one for each direction of the rank is the fleet's to say; here they are 0.

    `Slot({name: LayerSlot(*layer) for name, layer in layers(setting, card).items()})` is what the server must know; it
    is built where both rooms may be seen.

    Raises:
        BaseModelError: a target module that the model does not have.
    """
    first = card.num_layers - setting.layers_trained
    return {
        families.path(card, setting.family, index, module)
        + (piece.tensor and families.MARK + piece.tensor): PlannedLayer(
            piece.height,
            piece.width,
            piece.rows(setting.held),
            piece.rows(setting.rank) if index >= first and module in setting.trained else 0,
        )
        for index in range(card.num_layers)
        for module in setting.target_modules
        for piece in families.pieces(card, setting.family, module)
    }


def plan(
    profile: DeviceProfile,
    card: ModelCard,
    task: Task,
    budgets: Budgets | None = None,
    overrides: Overrides | None = None,
) -> Plan:
    """The best plan that fits; the same arguments always give the same plan.

    Args:
        profile: the device.
        card: the base model.
        task: what the fleet asks for.
        budgets: what the owner allows; by default all that the device can bear, and as long as it takes.
        overrides: choices that somebody insists on; honoured, or refused with the reason.

    Raises:
        PlanError: nothing fits; says what is missing and what would fit.
        ConfigError: an override that the fleet, the model or the device does not allow.
        BaseModelError: a target module that the model does not have.
    """
    insisted = overrides or Overrides()
    problem = _problem(profile, card, task, budgets, insisted)
    setting = search.best(problem)
    if setting is None:
        # Without the overrides, to tell whether it is they that do not fit.
        free = _problem(profile, card, task, budgets, Overrides())
        raise PlanError(explain.nothing_fits(problem, insisted, search.best(free) if insisted.given else None))
    taken = search.cost(problem, setting)
    cores = max(1, min(profile.usable_cores, profile.physical_cores))
    accumulation = -(-task.batch_size // setting.micro_batch)
    return Plan(
        rank=setting.rank,
        held=setting.held,
        layers_trained=setting.layers_trained,
        trained_modules=setting.trained,
        precision=setting.precision,
        compute_dtype=setting.compute_dtype,
        product_dtype=setting.products,
        micro_batch=setting.micro_batch,
        gradient_accumulation_steps=accumulation,
        max_length=setting.max_length,
        gradient_checkpointing=setting.gradient_checkpointing,
        recomputed_layers=setting.recomputed,
        optimizer=setting.optimizer,
        threads=insisted.threads or cores,
        family=setting.family,
        predicted_peak_bytes=taken.memory,
        predicted_step_seconds=(
            seconds_per_step(profile, card, setting, accumulation) if measured(profile, setting) else None
        ),
        predicted_round_bytes=taken.moved,
        reasons=explain.reasons(problem, setting, insisted),
        next_better=explain.raises(problem, setting),
    )


def smallest(profile: DeviceProfile, card: ModelCard, task: Task, overrides: Overrides | None = None) -> MemoryEstimate:
    """What the smallest plan of all would take at its peak, whatever the budgets are.

    Raises:
        ConfigError: as `plan`.
        BaseModelError: as `plan`.
    """
    problem = _problem(profile, card, task, Budgets(memory_bytes=1), overrides or Overrides())
    return estimate(card, search.smallest(problem), profile.pool)


def rows(plan: Plan) -> tuple[Row, ...]:
    """The plan as lines for people, in the order of its fields."""
    units = {"predicted_step_seconds": "s"}
    return tuple(
        Row(
            entry.name.removesuffix("_bytes").removesuffix("_seconds").replace("_", " "),
            shown(getattr(plan, entry.name), "bytes" if entry.name.endswith("_bytes") else units.get(entry.name, "")),
            plan.reasons[entry.name],
        )
        for entry in fields(plan)
        if entry.name not in ("reasons", "next_better")
    )


def _problem(
    profile: DeviceProfile, card: ModelCard, task: Task, budgets: Budgets | None, overrides: Overrides
) -> Problem:
    offered = search.options(profile, card, task, overrides)
    return Problem(profile, card, task, search.limits(profile, budgets or Budgets()), offered)
