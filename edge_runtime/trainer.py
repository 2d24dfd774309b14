"""The seam between protocol and learning: what a device is asked to do, and what a trainer answers.

`edge_runtime.train.local` is the real trainer. The protocol (`agent`, `client`, `wire`) knows only what is here, so it
runs without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from edge_runtime.lora.adapter import Adapter, Slot
from edge_runtime.lora.factors import Factors
from edge_runtime.lora.slices import Scores

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Model(BaseModel):
    """Frozen; unknown fields are ignored, because these values travel in messages."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Training(Model):
    """How a device trains in this round."""

    max_steps: Annotated[int, Field(ge=0)]
    learning_rate: Annotated[Finite, Field(gt=0, description="of a device that trains max_rank directions")]
    batch_size: Annotated[int, Field(ge=1, description="examples of one optimiser step")]
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[Finite, Field(ge=0)]
    max_grad_norm: Annotated[Finite, Field(gt=0)]
    seed: int
    schedule: Annotated[str, Field(description="how the learning rate falls; see schedule.SCHEDULES")] = "linear"
    lora_plus_ratio: Annotated[
        Finite, Field(ge=1, description="learning rate of `b` over that of `a` (LoRA+, arXiv 2402.12354)")
    ] = 1.0
    carry_moments: Annotated[
        bool, Field(description="whether the optimiser begins with the moments of the last round, rotated")
    ] = False
    proximal: Annotated[Finite, Field(ge=0, description="strength of the pull to what was received")] = 0.0
    correction: Annotated[Finite, Field(ge=0, description="strength of the push against the device's own drift")] = 0.0
    factors: Annotated[
        Factors, Field(description="which factors of the slice are trained; the others stay as they were received")
    ] = "ab"
    rate_exponent: Annotated[
        Finite, Field(ge=0, le=1, description="a device of rank r multiplies its rate by (max_rank / r) to this power")
    ] = 0.0
    kept: Annotated[
        Finite, Field(gt=0, le=1, description="share of a layer's directions that stay where it is pruned; 1 for never")
    ] = 1.0
    tail_penalty: Annotated[
        Finite, Field(ge=0, description="strength of the pull on the directions beyond that share")
    ] = 0.0


class AdapterSpec(Model):
    """What kind of adapter the fleet shares; a device plans with it before it says hello."""

    family: str
    target_modules: tuple[str, ...]
    scaling: Annotated[Finite, Field(gt=0, description="PEFT's lora_alpha / r, one number for every rank")]
    max_rank: Annotated[int, Field(ge=1, description="largest rank a device may train")]
    max_held: Annotated[int, Field(ge=1, description="largest rank a device may hold: that of the global adapter")]
    hold_more: Annotated[bool, Field(description="whether a device may hold directions that it does not train")]
    max_length: Annotated[int, Field(ge=8, description="tokens of an example, at most")]
    bits_up: Annotated[Finite, Field(gt=0, description="of a number in an update, before zstd")] = 8.0
    bits_down: Annotated[Finite, Field(gt=0, description="of a number of the global adapter, before zstd")] = 8.0
    slice: Annotated[str, Field(description="which held directions are trained; see lora.slices")] = "top"
    allocation: Annotated[str, Field(description="how many of which layer; see lora.allocation")] = "uniform"
    beside: Annotated[
        int, Field(ge=0, description="first directions of the global adapter that every device holds, beside its rank")
    ] = 0
    own: Annotated[
        int, Field(ge=0, description="directions that a device trains for itself alone, beside those of the fleet")
    ] = 0
    core: Annotated[
        int, Field(ge=0, description="rows and columns of the core that is trained in the place of each target")
    ] = 0
    regained: Annotated[
        int, Field(ge=0, description="directions of what a quantised base lost, beside each of its layers, never sent")
    ] = 0
    equal_ranks: Annotated[bool, Field(description="whether every device trains exactly max_rank")] = False


class PersonalSpec(Model):
    """How devices make their own adapters of the fleet's; what a device's own file says comes before it."""

    way: Annotated[str, Field(description="a name in ways.WAYS")] = "finetune"
    steps: Annotated[int, Field(ge=0, description="optimiser steps each time")] = 0
    proximal: Annotated[Finite, Field(ge=0, description="strength of the pull back to the global adapter")] = 0.0
    rank: Annotated[int, Field(ge=0, le=1024, description="of a pair beside; 0: half of what is trained")] = 0
    every: Annotated[int, Field(ge=0, description="rounds from one time to the next; 0: at the end alone")] = 0
    learning_rate: Annotated[Finite, Field(ge=0, description="as of a round; 0: that of the Directive's round")] = 0.0
    keep_better: Annotated[bool, Field(description="whether a worse one gives way to the global adapter")] = True


Texts = Literal["reported", "choosing"]
"""Of the held-out examples, those whose loss is told, or those by which one of two adapters is chosen; none is both."""


@dataclass(frozen=True)
class Introduction:
    """What a trainer knows of itself once it has planned.

    Attributes:
        slot: what it holds and trains of the fleet's.
        base: fingerprint of its base model.
        examples: how many it trains on.
        device: the device in a few words.
        precision: of its base weights, such as nf4.
        plan: the plan in a few words.
        software: versions that matter.
        least: numbers that each factor of a trained layer must keep for the plan's memory to suffice, if it has them.
        choosing: held-out examples by which it can choose between two adapters.
    """

    slot: Slot
    base: str
    examples: int
    device: str
    precision: str
    plan: str
    software: str
    least: int = 1
    choosing: int = 0


@dataclass(frozen=True, eq=False)
class LocalResult:
    """What a local round gave.

    Attributes:
        change: factor-wise change of the trained slice (see `lora.algebra.change`).
        examples: training examples really used.
        loss_first: mean training loss of the first steps, nats per token.
        loss_last: of the last steps.
    """

    change: Adapter
    examples: int
    loss_first: float
    loss_last: float


@dataclass(frozen=True)
class StepReport:
    """One optimiser step of local training."""

    step: int
    steps: int
    loss: float


Gate = Callable[[], bool]
"""Asked while a device trains: True for stop. It may block; a device that pauses waits in it, and loses nothing."""


class Trainer(Protocol):
    """Whoever plans, trains and evaluates on this device.

    Every method raises DeviceMemoryError where memory runs out, or where the process grew beyond what the device can
    bear. Then nothing is lost: `introduce` with a lower ceiling plans again, and a round that was interrupted goes on
    from its last complete step when the new plan trains the same slice in the same precision.
    """

    def introduce(
        self, spec: AdapterSpec, training: Training, ceiling: int | None, on_plan: Callable[[int], None]
    ) -> Introduction:
        """Plan for this kind of adapter and make the model ready.

        Args:
            spec: what the fleet shares.
            training: how its rounds train.
            ceiling: bytes that the plan must stay below, because a plan above it did not fit; None for no such limit.
            on_plan: told the plan's predicted peak, in bytes, before anything large is loaded.
        """

    def receive(self, adapter: Adapter, rows: Mapping[str, Sequence[int]] | None = None) -> None:
        """Put the global adapter, cut to what the slot holds, into the live model.

        Args:
            adapter: every layer of the slot that holds anything, at the rank held.
            rows: layer → which of its rows are trained, ascending; as many as the slot trains, or another number where
                the ranks of the layers are shared out anew. The first ones, as many as the slot says, where it is None.
                Where rows are named, a layer may have more of them than the slot holds.
        """

    def scores(self) -> Mapping[str, Scores]:
        """Layer → how much each direction of what was received matters to this device's own data.

        Of the layers that the slot trains; see `lora.slices`. Changes nothing.
        """

    def evaluate(self, texts: Texts = "reported") -> float:
        """Completion loss on held-out examples, nats per token, with what the live model holds now."""

    def train(
        self,
        training: Training,
        round_number: int,
        on_step: Callable[[StepReport], None],
        gate: Gate,
        personal: Adapter | None = None,
    ) -> LocalResult:
        """One local round from what was received, or training of the device's own.

        Args:
            training: what the round asks for.
            round_number: decides the order of the examples.
            on_step: told of each step that is complete.
            gate: asked before each micro-batch.
            personal: None for a round of the fleet's. For training of the device's own, the change by which what was
                received is away from the global adapter, so that a proximal term pulls to that one.

        Raises:
            KeyboardInterrupt: the gate said stop; a step that was not complete leaves no trace.
        """

    @property
    def peak_bytes(self) -> int:
        """Peak memory of this process so far, in bytes; pages that files back do not count."""


@dataclass(frozen=True)
class Delivered:
    """Where the personal adapter went, and how far it is from the live one when loaded afresh."""

    folder: str
    max_logit_diff: float
