"""One local round of a device, from the bands that it holds to the update that it offers: all but how it learns.

`client` and `simulation` do the same here, so that what a simulated device sends is what a real one would. What a
device remembers comes in as a `Memory`, what it keeps from the round goes out as a value: neither disk nor clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edge_runtime import private, slicing
from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.algebra import cut
from edge_runtime.state import Memory
from edge_runtime.trainer import Gate, Introduction, LocalResult, StepReport, Trainer
from edge_runtime.wire import bands, feedback, update
from edge_runtime.wire.messages import Band, Directive


@dataclass(frozen=True, eq=False)
class Contribution:
    """What a local round gave.

    Attributes:
        payload: the update's blob.
        residual: what will be owed once it is accepted; see `wire.feedback`.
        private: what the device keeps for itself from now on; None for what it has.
        facts: to be remembered with it.
        result: of the training.
        how: the codec, for people.
    """

    payload: bytes
    residual: bytes
    private: bytes | None
    facts: Mapping[str, Any]
    result: LocalResult
    how: str


def bands_of(directive: Directive, plan: Introduction) -> list[Band]:
    """The bands of a directive that a device with this plan holds."""
    held = max(plan.slot.held.values(), default=0)
    return [band for band in directive.bands if band.start < held and band.factor != directive.private]


def received(
    directive: Directive, plan: Introduction, decoded: Iterable[tuple[Band, Adapter]], memory: Memory
) -> Adapter:
    """The global adapter of a version, as far as a device holds it.

    Args:
        directive: names the version.
        plan: of the device.
        decoded: its bands, as `bands_of` gives them.
        memory: knows what the device keeps for itself.
    """
    whole, held = bands.assembled(decoded), plan.slot.held
    mine = Adapter({name: cut(whole[name], rank) for name, rank in held.items() if rank and name in whole})
    return private.known(mine, directive, plan.slot, memory, plan.base)


def contribute(  # noqa: PLR0913  each one is a seam
    directive: Directive,
    plan: Introduction,
    adapter: Adapter,
    trainer: Trainer,
    memory: Memory,
    *,
    round_bytes: int | None = None,
    on_step: Callable[[StepReport], None] = lambda _: None,
    gate: Gate = lambda: False,
) -> Contribution:
    """Train the slice that a directive asks for, and make an update of how it changed.

    Args:
        directive: of the round.
        plan: of the device.
        adapter: as `received` gave it, and in the live model already.
        trainer: of the device.
        memory: what the device remembers.
        round_bytes: what a round may move up and down; None for as much as there is.
        on_step: told of each step that is complete.
        gate: asked before each micro-batch.

    Raises:
        KeyboardInterrupt: the gate said stop.
        EdgeRuntimeError: training failed, or its outcome cannot travel.
    """
    chosen = slicing.choose(directive, plan, adapter, memory, trainer.scores)
    slices = chosen.slices
    if not chosen.plain:
        trainer.receive(slices.seen, slices.rows)
    result = trainer.train(directive.training, directive.round, on_step, gate)
    change, numbers = private.shared(result.change, slices.directions, directive.adapter.own)
    left = None if round_bytes is None else max(0, round_bytes - _downloaded(directive, plan))
    terms = update.Terms(directive.codec, directive.upload_bytes, left, directive.error_feedback, directive.sent)
    made = update.make(change, slices.before, feedback.load(memory.owed), terms, numbers)
    return Contribution(
        made.payload,
        feedback.dump(made.residual),
        private.after(adapter, slices, result.change, directive),
        {**slicing.pruned(directive, slices.before, result.change), **private.belonging(directive, plan.base)},
        result,
        made.how,
    )


def _downloaded(directive: Directive, plan: Introduction) -> int:
    return sum(band.blob.size for band in bands_of(directive, plan))
