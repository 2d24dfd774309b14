"""One local round: so many steps of AdamW on the trained slice.

The same base model, adapter, examples and task give the same bytes, whatever the micro-batch was cut for memory up to
rounding, and whether or not the round was interrupted. No clock is read and nothing is written here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from edge_runtime.errors import DataError, DeviceMemoryError, RoundError, unknown_name
from edge_runtime.lora.factors import Factors
from edge_runtime.schedule import SCHEDULES, rate_at
from edge_runtime.train import families, gradients, heap, optimizer
from edge_runtime.train.batches import Packed, pack_together
from edge_runtime.train.checkpointing import checkpointing, for_memory, released_layers
from edge_runtime.train.culprit import first_bad_output
from edge_runtime.train.data import Tokenised, batch_at
from edge_runtime.train.exhaustion import bearing
from edge_runtime.train.lean import lean
from edge_runtime.train.live import LiveModel
from edge_runtime.train.loss import SummedLoss, completion_loss, unwrap
from edge_runtime.train.packing import pack
from edge_runtime.train.resume import NotFiniteError, RoundState, StepReport, capture, restore
from edge_runtime.train.terms import Term


@dataclass(frozen=True)
class LocalTask:
    """What one round asks of a device, split as its plan says.

    Attributes:
        steps: optimiser steps of the round.
        learning_rate: the largest, after the warm-up.
        micro_batch: examples of full length that pass through the model at once.
        gradient_accumulation_steps: micro-batches of one optimiser step.
        warmup_steps: steps over which the learning rate rises to its largest.
        weight_decay: decoupled, of both factors.
        max_grad_norm: the gradient's norm is clipped to this.
        seed: decides the order of the examples, and dropout where the base model has any.
        gradient_checkpointing: recompute activations instead of keeping them.
        schedule: a name in SCHEDULES.
        optimizer: a name in optimizer.OPTIMIZERS.
        lora_plus_ratio: the learning rate of `b` over that of `a`, at least 1.
        family: the kind of adapter that the live model holds, a name in families.FAMILIES.
        pack_tokens: tokens that pass through the model at once, at most; `micro_batch` times the step's longest
            example where it is 0.
        recomputed_layers: with checkpointing, the first so many of the layers that the backward pass goes through are
            recomputed, and the last ones keep their activations; None for all of them.
        virtual_tokens: that the live model puts before each example; they take room in a pack.
        factors: which factors are trained, "ab", "a" or "b"; the others stay as they are.
    """

    steps: int
    learning_rate: float
    micro_batch: int = 1
    gradient_accumulation_steps: int = 1
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    gradient_checkpointing: bool = False
    schedule: str = "linear"
    optimizer: str = "adamw"
    lora_plus_ratio: float = 1.0
    family: str = "lora"
    pack_tokens: int = 0
    recomputed_layers: int | None = None
    virtual_tokens: int = 0
    factors: Factors = "ab"

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batch", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"a local task needs {name} of at least 1; found {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"a local task needs a positive {name}; found {getattr(self, name)}")
        if self.recomputed_layers is not None and self.recomputed_layers < 0:
            raise ValueError(f"a local task needs recomputed_layers of at least 0; found {self.recomputed_layers}")
        if not self.lora_plus_ratio >= 1:
            raise ValueError(f"a local task needs a lora_plus_ratio of at least 1; found {self.lora_plus_ratio}")
        for name, known in (("schedule", SCHEDULES), ("optimizer", optimizer.OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise ValueError(unknown_name(name, getattr(self, name), known))

    @property
    def batch_size(self) -> int:
        """Examples of one optimiser step."""
        return self.micro_batch * self.gradient_accumulation_steps


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What a round came to.

    Attributes:
        loss_first: mean loss of the completion tokens over the first quarter of the steps done, in nats.
        loss_last: the same over the last quarter.
        steps: optimiser steps done.
        examples: different examples used.
        tokens: completion tokens trained on, each time they were.
        finished: False where `should_stop` or a lack of memory ended the round early.
        failure: why memory did not suffice; empty where it did.
        state: what `train_round` needs as `start` to go on.
    """

    loss_first: float
    loss_last: float
    steps: int
    examples: int
    tokens: int
    finished: bool
    failure: str
    state: RoundState


class _Run(NamedTuple):
    """What every step of one round needs."""

    live: LiveModel
    task: LocalTask
    parameters: Mapping[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    should_stop: Callable[[], bool] | None
    terms: Sequence[Term]


class _Stopped(Exception):  # noqa: N818 - a signal between two functions of this module, not an error
    pass


class _HalfUpdated(Exception):  # noqa: N818 - as above
    pass


def learning_rate_at(task: LocalTask, step: int) -> float:
    """The learning rate of a step, counted from 0: a linear rise, then the task's schedule. Never zero."""
    share = rate_at(step, steps=task.steps, warmup_steps=task.warmup_steps, schedule=task.schedule)
    return task.learning_rate * share


def train_round(  # noqa: PLR0913 - what a round begins with, and who is told or asked while it lasts
    live: LiveModel,
    examples: Sequence[Tokenised],
    task: LocalTask,
    *,
    start: RoundState | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    keep: Callable[[Callable[[], RoundState]], None] | None = None,
    terms: Sequence[Term] = (),
) -> TrainResult:
    """Train the slice of a live model, in place.

    Args:
        live: holds the adapter to start from, unless `start` brings its own.
        examples: the device's own; every one is used before any is used again.
        task: what to do.
        start: the state of an interrupted round of the same task, to finish it as if it had not been interrupted; or
            one without steps, whose moments the optimiser is to begin with. It is used up.
        on_step: called after each optimiser step. It may raise DeviceMemoryError: then the round ends, as it does when
            memory runs out; the result says so, and holds the state to go on from with a smaller micro-batch.
        should_stop: asked before each micro-batch; a step that is not complete leaves no trace. It may block: a device
            that pauses waits in it, and the round goes on as if nothing had happened. It may raise as `on_step` may.
        keep: called after each optimiser step, before `on_step`, with a function that gives the state as views: good
            until `keep` returns, and without memory of its own on a CPU. Whoever keeps states on disk calls it.
        terms: beside the loss; an interrupted round goes on with the same ones.

    Raises:
        DeviceMemoryError: memory ran out in the middle of an update: the round can only begin anew.
        DataError: no example, or a step whose examples have no completion.
        NotFiniteError: a loss or gradient that is not finite; says where it began. The step was not taken, and the
            error holds the state before it.
        RoundError: a parameter without a gradient, or a `start` that does not fit the live model.
        MissingExtraError: the task's optimiser needs a library that is not installed.
    """
    if not examples:
        raise DataError("expected at least one example to train on, found none; give this device data")
    whole = families.get(task.family).trainable(live)
    parameters = _prepared(whole, task)
    run = _Run(live, task, whole, _optimizer(task, parameters), should_stop, terms)
    reports: list[StepReport] = []
    beside = start.beside if start is not None else {}
    if start is not None:
        reports.extend(start.reports)
        restore(parameters, run.optimizer, start)
    finished, failure, broken = True, "", None
    try:
        with training_mode(live, task):
            for step in range(len(reports), task.steps):
                batch = [examples[index] for index in _indices(len(examples), task, step)]
                reports.append(_step(run, batch, step))
                if keep is not None:
                    keep(lambda: capture(parameters, run.optimizer, tuple(reports), beside=beside, copy=False))
                if on_step is not None:
                    on_step(reports[-1])
    except _Stopped:
        finished = False
    except _HalfUpdated as error:
        raise DeviceMemoryError(str(error)) from None
    except DeviceMemoryError as error:
        finished, failure = False, str(error)
    except NotFiniteError as error:
        broken = str(error)
    run.optimizer.zero_grad(set_to_none=True)
    # Nobody moves the moments again, so they are handed over; the parameters live on in the model.
    state = capture(parameters, run.optimizer, tuple(reports), beside=beside, copy=False)
    state = replace(state, parameters={name: value.copy() for name, value in state.parameters.items()})
    if broken is not None:
        raise NotFiniteError(broken, state)
    return _result(state, examples, task, finished=finished, failure=failure)


def learning(parameters: Mapping[str, torch.nn.Parameter], factors: Factors) -> dict[str, torch.nn.Parameter]:
    """Of a slice's parameters, those that a round which trains these factors changes.

    Args:
        parameters: those of a family, by name; a name that ends in neither ".a" nor ".b" is of no factor.
        factors: as in a task.
    """
    still = {"ab": (), "a": (".b",), "b": (".a",)}[factors]
    return {name: parameter for name, parameter in parameters.items() if not name.endswith(still)}


def _prepared(parameters: Mapping[str, torch.nn.Parameter], task: LocalTask) -> dict[str, torch.nn.Parameter]:
    """Those that the task changes; the others require no gradient for now."""
    found = learning(parameters, task.factors)
    if not found:
        raise RoundError("this device's slot trains no layer; expected at least one, or no call for training")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in found)
    return found


def _indices(count: int, task: LocalTask, step: int) -> tuple[int, ...]:
    # Of the whole step, so that the order does not depend on how memory cuts it into micro-batches.
    return batch_at(step, count=count, micro_batch=task.batch_size, seed=task.seed)


def _optimizer(task: LocalTask, parameters: Mapping[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    return optimizer.build(
        task.optimizer,
        parameters,
        learning_rate=task.learning_rate,
        weight_decay=task.weight_decay,
        lora_plus_ratio=task.lora_plus_ratio,
    )


def _step(run: _Run, batch: Sequence[Tokenised], step: int) -> StepReport:
    task = run.task
    tokens = sum(example.learned for example in batch)
    if not tokens:
        raise DataError(f"step {step + 1}: expected completion tokens in its {len(batch)} examples, found none")
    # Of the step, not of the round: an interrupted round then sees the same dropout, if the base has any.
    torch.manual_seed(task.seed * 1_000_003 + step)
    run.optimizer.zero_grad(set_to_none=True)
    loss = 0.0
    lengths = [len(example.input_ids) + task.virtual_tokens for example in batch]
    for members in pack(lengths, task.pack_tokens or task.micro_batch * max(lengths)):
        if run.should_stop is not None and run.should_stop():
            raise _Stopped
        with bearing(f"step {step + 1} passed {len(members)} examples through the model"):
            loss += _accumulate(run.live, [batch[member] for member in members], tokens, step)
    norms = gradients.finish(run.live.model, run.parameters, run.terms, task.max_grad_norm, step)
    rate = learning_rate_at(task, step)
    _update(run.optimizer, rate, step)
    return StepReport(step + 1, task.steps, loss, tokens, rate, norms.total, norms.loss)


def _update(updating: torch.optim.Optimizer, rate: float, step: int) -> None:
    optimizer.set_rate(updating, rate)
    try:
        with bearing(f"step {step + 1} updated the adapter"):
            updating.step()
    except DeviceMemoryError as error:
        # Some parameters have moved and others have not: nobody could go on from there.
        raise _HalfUpdated(str(error)) from None


def _accumulate(live: LiveModel, examples: Sequence[Tokenised], tokens: int, step: int) -> float:
    """Add a micro-batch's share of the gradient of the step's mean token loss; returns its share of that loss."""
    causal = unwrap(live.model)
    row = pack_together(examples, causal.get_input_embeddings().weight.device)
    share = _loss(live, row).total / tokens
    value = float(share.detach())
    if not math.isfinite(value):
        del share  # and with it what the forward pass kept: the search needs room of its own
        where = first_bad_output(causal, lambda: _loss(live, row))
        raise NotFiniteError(
            f"step {step + 1}: expected a finite loss, found {value}, first {where}; "
            "lower learning_rate, or compute in float32"
        )
    share.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    del share
    heap.release()  # the next micro-batch has other lengths, which would not fit into the holes of this one
    return value


def _loss(live: LiveModel, row: Packed) -> SummedLoss:
    return completion_loss(live.model, row.input_ids, row.labels, row.position_ids, row.lengths)


@contextmanager
def training_mode(live: LiveModel, task: LocalTask) -> Iterator[None]:
    """Training mode, checkpointing and a random state of its own; all as before when the context ends."""
    causal = unwrap(live.model)
    was_training = live.model.training
    device = causal.get_input_embeddings().weight.device
    cards = [device] if device.type == "cuda" else []
    recomputed = task.recomputed_layers if task.gradient_checkpointing else 0
    fork = torch.random.fork_rng(devices=cards)
    between = heap.LAYERS_BETWEEN_TIGHT if for_memory(causal, recomputed) else heap.LAYERS_BETWEEN
    with fork, lean(causal), heap.releasing(released_layers(causal), between), checkpointing(causal, recomputed):
        live.model.train()
        try:
            yield
        finally:
            live.model.train(was_training)


def _result(
    state: RoundState, examples: Sequence[Tokenised], task: LocalTask, *, finished: bool, failure: str
) -> TrainResult:
    reports = state.reports
    quarter = max(1, len(reports) // 4)
    used = {index for step in range(len(reports)) for index in _indices(len(examples), task, step)}
    return TrainResult(
        loss_first=_mean_loss(reports[:quarter]),
        loss_last=_mean_loss(reports[-quarter:]),
        steps=len(reports),
        examples=len(used),
        tokens=sum(report.tokens for report in reports),
        finished=finished,
        failure=failure,
        state=state,
    )


def _mean_loss(reports: Sequence[StepReport]) -> float:
    """The mean over the steps' tokens; nan where no step was done."""
    tokens = sum(report.tokens for report in reports)
    return sum(report.loss * report.tokens for report in reports) / tokens if tokens else math.nan
