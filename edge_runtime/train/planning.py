"""From what the fleet asks for and the owner allows to this device's plan and its slot."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from edge_runtime.config import Device
from edge_runtime.errors import ConfigError
from edge_runtime.lora.adapter import LayerSlot, Slot
from edge_runtime.lora.dense import is_dense
from edge_runtime.trainer import AdapterSpec, Training
from profiles.card import ModelCard
from profiles.device import DeviceProfile
from profiles.explain import OPTIMIZERS
from profiles.families import family
from profiles.plan import Plan, plan
from profiles.terms import Budgets, Overrides, Task


@dataclass(frozen=True)
class Owner:
    """What the owner of this device allows and insists on; see `edge_runtime.config.Device`.

    Attributes:
        memory_limit: bytes that training may use, below what the machine allows; None for no such limit.
        round_seconds: seconds that a round may take; None for any.
        round_bytes: bytes that a round may move; None for any.
        overrides: choices that are not left to the plan.
    """

    memory_limit: int | None = None
    round_seconds: float | None = None
    round_bytes: int | None = None
    overrides: Overrides = field(default_factory=Overrides)


def owner_of(device: Device) -> Owner:
    """What the device's section of the configuration says."""
    chosen = {entry.name: getattr(device, entry.name) for entry in fields(Overrides)}
    return Owner(device.memory_limit, device.round_seconds, device.round_bytes, Overrides(**chosen))


def choose(
    profile: DeviceProfile,
    card: ModelCard,
    spec: AdapterSpec,
    training: Training,
    owner: Owner,
    ceiling: int | None,
) -> Plan:
    """The best plan for this device.

    Args:
        profile: what the device is; its bearable memory heeds the owner's limit already.
        card: the base model.
        spec: what the fleet shares.
        training: how its rounds train.
        owner: what the owner allows.
        ceiling: bytes that the plan must stay below, because a plan above it did not fit; None for no such limit.

    Raises:
        PlanError: not even the smallest plan fits.
        ConfigError: an override that the fleet or the model does not permit.
    """
    ranked = family(spec.family).ranked
    task = Task(
        target_modules=spec.target_modules,
        max_rank=min(spec.max_rank, spec.max_held) + spec.own if ranked else 1,
        max_held=spec.max_held + spec.own if ranked else 1,
        max_length=spec.max_length,
        batch_size=training.batch_size,
        steps=training.max_steps,
        hold_more=spec.hold_more,
        beside=spec.beside,
        bits_up=spec.bits_up,
        bits_down=spec.bits_down,
        # What was received of the trained slice is held in any case, but not on a card.
        copies=bool(training.correction) + (bool(training.proximal) and profile.pool != "host"),
        family=spec.family,
        regained=spec.regained,
    )
    memory = ceiling
    if ceiling is not None and "memory_bearable_bytes" not in profile.unreadable:
        memory = min(ceiling, profile.memory_bearable_bytes)
    budgets = Budgets(memory, owner.round_seconds, owner.round_bytes)
    return plan(profile, card, task, budgets, _overrides(owner, spec))


def _overrides(owner: Owner, spec: AdapterSpec) -> Overrides:
    """What is not left to the plan: what the owner insists on, and the rank where all devices train the same."""
    if not spec.equal_ranks:
        return owner.overrides
    if owner.overrides.rank not in {None, spec.max_rank}:
        raise ConfigError(
            f"every device of this fleet trains rank {spec.max_rank}; found [device] rank {owner.overrides.rank}; "
            "leave it out, or let the fleet merge by a method for unequal ranks, such as increment"
        )
    return replace(owner.overrides, rank=spec.max_rank + spec.own)


def slot_of(chosen: Plan, card: ModelCard, spec: AdapterSpec) -> Slot:
    """The plan's slot within the fleet's terms: no rank beyond a layer's size, nothing held that must not be."""
    layers = {}
    for path, layer in chosen.layers(card, spec.target_modules).items():
        if is_dense(path):
            # One row, or as many as the global adapter has.
            layers[path] = LayerSlot(layer.d_out or spec.max_held, layer.d_in, layer.held, layer.trained)
            continue
        name, d_out, d_in = path, layer.d_out, layer.d_in
        if spec.core:
            # A core is a layer of its own, and square; the plan knows the one beside which it stands.
            size = min(spec.core, d_out, d_in)
            name, d_out, d_in = f"{path}.core", size, size
        beside, widest = min(spec.beside, d_out, d_in), min(d_out, d_in, spec.max_held)
        own = min(spec.own, d_out, d_in) if layer.trained else 0
        trained = min(max(layer.trained - spec.own, 0), widest)
        held = layer.held if spec.hold_more else (layer.trained or chosen.rank) - spec.own
        held = max(trained, min(held, widest))
        layers[name] = LayerSlot(d_out, d_in, beside + held + own, trained + own)
    return Slot(layers)


def shared(slot: Slot, spec: AdapterSpec) -> Slot:
    """What of a slot is the fleet's: all but the directions that the device trains for itself alone."""
    layers = {}
    for name, layer in slot.layers.items():
        own = min(spec.own, layer.d_out, layer.d_in) if layer.trained else 0
        layers[name] = replace(layer, held=layer.held - own, trained=layer.trained - own)
    return Slot(layers)


def in_words(chosen: Plan, card: ModelCard, spec: AdapterSpec) -> str:
    """A plan on one line."""
    all_targets = set(chosen.trained_modules) == set(spec.target_modules)
    layers = "all" if chosen.layers_trained == card.num_layers else f"last {chosen.layers_trained}"
    modules = "" if all_targets else f" ({', '.join(chosen.trained_modules)})"
    recomputed = "" if chosen.recomputed_layers == chosen.layers_trained else f" {chosen.recomputed_layers}"
    of_all = f"{recomputed} of {chosen.layers_trained} layers" if recomputed else ""
    checkpointing = f", checkpointing{of_all}" if chosen.gradient_checkpointing else ""
    optimizer = "" if chosen.optimizer == "adamw" else f", {OPTIMIZERS[chosen.optimizer]}"
    return (
        f"rank {chosen.rank} of {chosen.held} held, {layers} of {card.num_layers} layers{modules}, {chosen.precision}, "
        f"{chosen.compute_dtype} compute, micro-batch {chosen.micro_batch} x {chosen.max_length} tokens"
        f"{checkpointing}{optimizer}, ≤ {chosen.predicted_peak_bytes / 2**20:.0f} MiB"
    )
