"""Devices that are not there: from the catalogue and a fleet's file to the plans that they would make.

Plans are the planner's own, within the memory of each device: a simulated Jetson Nano trains what a Jetson Nano would.
Times are those of the speed model for that plan; bytes are those of the base model that is planned for, even where a
surrogate is trained in its place.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

from edge_runtime.config import Config, Device, cache_dir
from edge_runtime.errors import ConfigError, FingerprintMismatchError, PlanError
from edge_runtime.lora.adapter import Slot
from edge_runtime.train.planning import Owner, choose, in_words, owner_of, shared, slot_of
from edge_runtime.trainer import AdapterSpec, Introduction, Training
from profiles import catalogue, families
from profiles.card import ModelCard
from profiles.device import DeviceProfile
from profiles.machine import with_reserve
from profiles.memory import LEAST_8BIT
from profiles.plan import Plan
from profiles.speed import seconds_per_step
from simulation.links import Quality, quality
from simulation.settings import Devices, Simulation, name_of
from simulation.surrogate import Problem

MIB = 2**20
FORWARD = 1 / 3
"""Of the time of an optimiser step: an evaluation has no backward pass."""


@dataclass(frozen=True)
class Group:
    """Devices of one kind.

    Attributes:
        settings: the table of the fleet's file.
        profile: of the catalogue, within the owner's limit.
        owner: what the owners of such devices insist on.
        up: of its link.
        down: of its link.
    """

    settings: Devices
    profile: DeviceProfile
    owner: Owner
    up: Quality
    down: Quality

    @property
    def name(self) -> str:
        """What the group is called."""
        return name_of(self.settings)

    @property
    def load_watts(self) -> float:
        """Of a device that computes."""
        return self.profile.power_watts

    @property
    def idle_watts(self) -> float:
        """Of a device that sends or receives."""
        return self.settings.idle_share * self.profile.power_watts


@dataclass(frozen=True, eq=False)
class Planned:
    """What a group's devices do in the rounds of a fleet.

    Attributes:
        plan: the planner's, without its reasons.
        key: a digest of the plan and of what it holds and trains.
        intro: how such a device introduces itself, but for its examples.
        step_seconds: of one optimiser step.
        evaluate_seconds: of an evaluation on what is held out.
        up_scale: bytes that an update of the base model has, for each byte of the one that is sent.
        down_scale: the same of a band.
        round_bytes: that a round may move, of those that are sent; None for as much as there is.
    """

    plan: Plan
    key: str
    intro: Introduction
    step_seconds: float
    evaluate_seconds: float
    up_scale: float = 1.0
    down_scale: float = 1.0
    round_bytes: int | None = None


def device_of(device: Device, settings: Devices) -> Device:
    """The [device] of a real device of this group: that of the fleet's file, with what the group says over it."""
    own = {key: getattr(settings.owner, key) for key in settings.owner.model_fields_set}
    if settings.memory_limit is not None:
        own["memory_limit"] = settings.memory_limit
    return device.model_copy(update=own)


def base_of(config: Config, simulation: Simulation) -> str:
    """The fingerprint of the base that a simulated fleet trains: with real training, that of its files.

    Raises:
        FingerprintMismatchError: the fleet's file names another.
        UnknownBaseError: real training, and no such base.
    """
    named = config.fleet.base
    if simulation.trainer == "surrogate":
        return named or hashlib.sha256(simulation.base.encode()).hexdigest()
    from edge_runtime.train import source  # noqa: PLC0415  it belongs to an extra

    found = source.fingerprint(source.resolve(simulation.base), memo=cache_dir() / "bases" / "digests")
    if named not in {None, found}:
        raise FingerprintMismatchError(
            f"this fleet trains the base {named}; [simulation] base '{simulation.base}' is {found}; give the same "
            "base, or leave [fleet] base out"
        )
    return found


def group_of(settings: Devices, device: Device) -> Group:
    """A group with what the catalogue knows of it.

    Args:
        settings: the table of the fleet's file.
        device: [device] of that file.

    Raises:
        ConfigError: no such device (lists those there are), or its link is unknown and the file does not say it.
    """
    profile, link = catalogue.device(settings.device), settings.link
    owner = owner_of(device_of(device, settings))
    if owner.memory_limit is not None:
        bearable = min(with_reserve(owner.memory_limit, "the limit").value, profile.memory_bearable_bytes)
        profile = replace(profile, memory_bearable_bytes=bearable)
    up, down = link.up_mbit_s or profile.link_up_mbit_s, link.down_mbit_s or profile.link_down_mbit_s
    if not (up and down):
        raise ConfigError(
            f"nothing says how fast the link of '{name_of(settings)}' is; expected up_mbit_s and down_mbit_s in its "
            "link, or in the file of the device"
        )
    latency = profile.link_latency_ms if link.latency_ms is None else link.latency_ms
    return Group(settings, profile, owner, quality(up, latency, link.loss), quality(down, latency, link.loss))


class Planning:
    """Makes the plans of a fleet's groups, each once.

    Args:
        config: the fleet's file.
        simulation: its [simulation].
        card: of the base model.
        problem: the surrogate that is trained in its place; None for real training.

    Raises:
        EdgeRuntimeError: as `base_of`.
    """

    def __init__(self, config: Config, simulation: Simulation, card: ModelCard, problem: Problem | None) -> None:
        self._config, self._card, self._problem = config, card, problem
        self._base, self._length = base_of(config, simulation), simulation.example_tokens
        self._known: dict[tuple[object, ...], Planned] = {}

    def plan(self, group: Group, spec: AdapterSpec, training: Training) -> Planned:
        """What a group's devices do.

        Raises:
            PlanError: such a device cannot bear the smallest plan.
            ConfigError: nothing says how fast it is.
        """
        # The factors of a round, and what else changes from one to the next, change no plan.
        key = (group.name, spec, training.max_steps, training.batch_size)
        if key not in self._known:
            self._known[key] = self._planned(group, spec, training)
        return self._known[key]

    def check(self, groups: list[Group], spec: AdapterSpec, training: Training) -> None:
        """See that every device can hold the base, before anything begins.

        Raises:
            PlanError: names those that cannot, and why.
            ConfigError: the surrogate has no such adapter.
        """
        if self._problem is not None and (spec.family != "lora" or spec.core):
            raise ConfigError(
                f"the surrogate trains low-rank pairs; found the family '{spec.family}'"
                f"{' with cores' if spec.core else ''}; set [simulation] trainer = 'real'"
            )
        refused = []
        for group in groups:
            try:
                self.plan(group, spec, training)
            except PlanError as error:
                refused.append(f"'{group.name}' ({group.settings.count} x {group.settings.device}): {error}")
        if refused:
            # Each on a line of its own: there may be many, and each says what would make it fit.
            whole = "\n  ".join([f"this fleet is impossible with the base '{self._card.name}':", *refused])
            raise PlanError(f"{whole}\nor leave these devices out")

    def _planned(self, group: Group, spec: AdapterSpec, training: Training) -> Planned:
        card, problem = self._card, self._problem
        chosen = choose(group.profile, card, spec, training, group.owner, None)
        seconds = chosen.predicted_step_seconds
        if seconds is None:
            raise ConfigError(
                f"the file of '{group.settings.device}' lacks the rates that a prediction of time needs; "
                "expected those of a device of the catalogue"
            )
        seconds *= self._shorter(group, chosen, spec)
        device = self._config.device
        evaluation = FORWARD * seconds * device.eval_examples / training.batch_size
        # Reasons are for people at a device; here they would travel with every round to a worker.
        chosen = replace(chosen, reasons={}, next_better={})
        most = group.owner.round_bytes
        if problem is None:
            slot = shared(slot_of(chosen, card, spec), spec)
            intro = self._introduction(group, chosen, spec, slot)
            return Planned(chosen, _key(chosen, slot), intro, seconds, evaluation, round_bytes=most)
        rank = chosen.rank - spec.own
        held = chosen.held if spec.hold_more else rank
        slot = problem.slot(rank, held + spec.beside, chosen.layers_trained / card.num_layers)
        up = _ratio(card, chosen, chosen.trained_modules, chosen.layers_trained, _trained(slot))
        return Planned(
            chosen,
            _key(chosen, slot),
            self._introduction(group, chosen, spec, slot),
            seconds,
            evaluation,
            up,
            _ratio(card, chosen, spec.target_modules, card.num_layers, 2 * problem.settings.width * len(slot.layers)),
            None if most is None else int(most / up),
        )

    def _shorter(self, group: Group, chosen: Plan, spec: AdapterSpec) -> float:
        """What a step takes with examples of the length that they have, over what it takes with the longest ones."""
        length = self._length
        if length is None or length >= chosen.max_length:
            return 1.0
        whole = replace(chosen.setting(spec.target_modules), regained=spec.regained)
        # As many passes: a pack that holds the longest examples seldom holds one more of these.
        took, takes = (
            seconds_per_step(group.profile, self._card, setting, chosen.gradient_accumulation_steps)
            for setting in (whole, replace(whole, max_length=length))
        )
        return takes / took

    def _introduction(self, group: Group, chosen: Plan, spec: AdapterSpec, slot: Slot) -> Introduction:
        return Introduction(
            slot=slot,
            base=self._base,
            examples=1,
            device=f"{group.profile.name}: {group.profile.cpu_model}, simulated",
            precision=chosen.precision,
            plan=in_words(chosen, self._card, spec),
            least=LEAST_8BIT if chosen.optimizer == "adamw_8bit" else 1,
            software="simulation",
        )


def _key(chosen: Plan, slot: Slot) -> str:
    return hashlib.sha256(f"{json.dumps(chosen.to_json())} {slot}".encode()).hexdigest()


def _ratio(card: ModelCard, chosen: Plan, modules: tuple[str, ...], layers: int, surrogate: float) -> float:
    """Numbers of one direction of the base's layers, over those of the surrogate's."""
    return families.numbers(card, chosen.family, modules, 1, layers) / surrogate


def _trained(slot: Slot) -> int:
    """Numbers of one trained direction of all layers."""
    return sum(slot.layers[name].d_out + slot.layers[name].d_in for name in slot.trained)
