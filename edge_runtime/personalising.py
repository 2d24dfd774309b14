"""A device makes its own adapter of the fleet's: what it begins with, which of the two it keeps, and what it remembers.

What is its own outlives rounds, restarts and versions: it is kept as a product (see `lora.rebasing`), with the life of
the fleet, the base and the version that it belongs to, in one transaction; another life or another base does not get
it. Where the fleet's method gives devices a private part, that part is trained further, and kept in its own place.

Of the personal and the global adapter the better one is kept, by its loss on held-out examples that choose and are
never reported (`train.own_texts`); the losses that are reported are of other examples, and choose nothing. Where the
global one is better, nothing personal is kept, and the next time begins from the global adapter of that time.

A device that is killed on the way makes the same bytes again: training goes on from its last kept step, and what it
began with is replaced only after all is done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from edge_runtime import private, ways
from edge_runtime.lora.adapter import Adapter
from edge_runtime.state import DeviceState
from edge_runtime.trainer import Gate, Introduction, PersonalSpec, StepReport, Trainer
from edge_runtime.wire import codec
from edge_runtime.wire.messages import Directive


@dataclass(frozen=True, eq=False)
class Made:
    """A personal adapter, in the live model, or the global one in its place.

    Attributes:
        way: how it was made; empty where there was nothing to make.
        delivered: which of the two is in the model.
        told: the choice in words; empty where there was none.
        losses: on the reported examples, of those that were evaluated.
        record: what it belongs to.
        change: what is the device's own, encoded; None for nothing.
        private: the private part of the rounds, encoded; None for the one there is.
    """

    way: str = ""
    delivered: Literal["personal", "global"] = "global"
    told: str = ""
    losses: Mapping[str, float] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    change: bytes | None = None
    private: bytes | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """What a personal adapter is made of.

    Attributes:
        directive: of the version that it is made of.
        plan: of this device.
        received: that version, as far as the device holds it, with its private parts; in the live model already.
        steps: optimiser steps.
        at_end: whether the rounds are over, so that losses are reported.
    """

    directive: Directive
    plan: Introduction
    received: Adapter
    steps: int
    at_end: bool


class Personalising:
    """Makes personal adapters and remembers what is this device's own.

    Args:
        trainer: has planned.
        disk: remembers.
        own: what this device's file says of it.
        say: told a sentence for people.
    """

    def __init__(self, trainer: Trainer, disk: DeviceState, own: ways.Own, say: Callable[[str], None]) -> None:
        self._trainer, self._disk, self._own, self._say = trainer, disk, own, say

    def check(self, directive: Directive | None) -> None:
        """See early that what this device's file asks for is possible in its fleet.

        Raises:
            ConfigError: as `ways.asked`.
        """
        if directive is not None:
            ways.asked(directive, self._own)

    def due(self, directive: Directive) -> bool:
        """Whether a device that has ended this round goes on with its own adapter while it waits.

        Raises:
            ConfigError: as `ways.asked`.
        """
        asked = ways.asked(directive, self._own)
        free, steps = asked.way in ways.FREE, bool(asked.steps)  # a private part is trained in the rounds themselves
        return free and steps and bool(asked.every) and directive.round % asked.every == 0

    def make(self, job: Job, on_step: Callable[[StepReport], None], gate: Gate) -> Made:
        """Make one; it is in the live model when this returns, and remembered once `keep` was called.

        Raises:
            ConfigError: as `ways.asked`.
            EdgeRuntimeError: as `Trainer.train`.
            KeyboardInterrupt: the gate said stop.
        """
        asked = ways.asked(job.directive, self._own)
        record, change = self._known(job)
        about = _about(job, asked)
        if record.get("about") == about:
            return self._again(job, asked, record, change)
        if not job.steps and not change:
            return self._as_received(job, asked)
        before = self._judged(job)
        scene = ways.Scene(job.received, job.directive, job.plan.slot, asked.rank, change)
        start = ways.WAYS[asked.way].begin(scene)
        self._trainer.receive(start.slices.seen, start.slices.rows)
        moved = self._trained(job, asked, start, on_step, gate)
        losses = {"personal": self._trainer.evaluate()} if job.at_end else {}
        keeps, told = _choice(before, self._judged(job), better=asked.keep_better)
        if not keeps:
            self._trainer.receive(job.received)
        if told:
            self._say(told)
        delivered: Literal["personal", "global"] = "personal" if keeps else "global"
        found = {"version": job.directive.version, "delivered": delivered, "told": told, "losses": losses}
        kept = _kept(asked.way, scene, start, moved) if keeps else (None, None)
        return Made(asked.way, delivered, told, losses, _belonging(job) | {"about": about} | found, *kept)

    def keep(self, made: Made, losses: Mapping[str, float | None]) -> None:
        """Remember what was made, all or nothing.

        Args:
            made: by `make`.
            losses: more of what was found, to be said again if the device is asked again.
        """
        if made.record:
            found = {name: value for name, value in losses.items() if value is not None}
            record = {**made.record, "losses": {**found, **made.record["losses"]}}
            self._disk.put_personal(record, made.change, made.private)

    def _known(self, job: Job) -> tuple[Mapping[str, Any], Adapter]:
        """What is remembered of this life and base: its record, and what is the device's own."""
        found = self._disk.personal
        if found is None or any(found[0].get(key) != value for key, value in _belonging(job).items()):
            return {}, Adapter({})
        record, change = found
        return record, codec.decode(change) if change is not None else Adapter({})

    def _again(self, job: Job, asked: PersonalSpec, record: Mapping[str, Any], change: Adapter) -> Made:
        """Made already, of this very version; what it takes to have it in the model once more."""
        if record["delivered"] == "personal" and change:
            scene = ways.Scene(job.received, job.directive, job.plan.slot, asked.rank, change)
            start = ways.WAYS[asked.way].begin(scene)
            self._trainer.receive(start.slices.seen, start.slices.rows)
        self._say("the personal adapter of this version is made already")
        return Made(asked.way, record["delivered"], record["told"], record["losses"])

    def _as_received(self, job: Job, asked: PersonalSpec) -> Made:
        """Nothing is made of what was received, which has a private part where the fleet's method has one."""
        losses = {"personal": self._trainer.evaluate()} if job.at_end else {}
        return Made(losses=losses) if asked.way in ways.FREE else Made(asked.way, "personal", losses=losses)

    def _trained(
        self, job: Job, asked: PersonalSpec, start: ways.Start, on_step: Callable[[StepReport], None], gate: Gate
    ) -> Adapter:
        """Factor-wise change of the trained rows; no layer where there was no step."""
        if not job.steps:
            return Adapter({})
        training = ways.training_of(asked, job.directive, job.steps, start.factors)
        return self._trainer.train(training, job.directive.round + 1, on_step, gate, start.away).change

    def _judged(self, job: Job) -> float | None:
        return self._trainer.evaluate("choosing") if job.plan.choosing else None


def _about(job: Job, asked: PersonalSpec) -> str:
    """All that decides what is made, but for the device's own part and data."""
    facts = (job.directive.run, job.directive.round, job.directive.version, job.steps, asked, job.directive.training)
    return hashlib.sha256("\0".join(map(repr, facts)).encode()).hexdigest()


def _kept(way: str, scene: ways.Scene, start: ways.Start, moved: Adapter) -> tuple[bytes | None, bytes | None]:
    """What is remembered of a personal adapter that is kept: the device's change, or its private part."""
    changed = ways.WAYS[way].changed
    if changed is None:
        return None, private.after(scene.received, start.slices, moved, scene.directive) if moved else None
    own = changed(scene, start, moved) if moved else scene.change
    return codec.encode(own, "fp32") if own else None, None


def _belonging(job: Job) -> dict[str, Any]:
    return {"run": job.directive.run, "base": job.plan.base}


def _choice(before: float | None, after: float | None, *, better: bool) -> tuple[bool, str]:
    """Whether the personal adapter is kept, and why in words."""
    if before is None or after is None:
        return True, ""
    if after <= before:
        return True, f"the personal adapter is kept: {after:.3f} against {before:.3f} on the texts that choose"
    told = f"the personal adapter is worse than the global one on the texts that choose ({after:.3f}, {before:.3f})"
    return not better, f"{told}; " + ("the global one is kept" if better else "it is kept all the same")
