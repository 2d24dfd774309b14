"""A device's round as a pure function: the same task gives the same bytes, in whichever process, as often as asked.

So engines differ in nothing but speed, a worker that was killed costs time and no result, and what was computed before
a simulation was killed is computed once.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from edge_runtime import local_round
from edge_runtime.lora.adapter import Adapter
from edge_runtime.trainer import Introduction, Trainer
from edge_runtime.wire import codec
from edge_runtime.wire.messages import Directive
from profiles.plan import Plan
from server.one_thread import one_thread
from simulation.settings import Simulation, files_of
from simulation.stored import Blob, whole
from simulation.surrogate import Problem, SurrogateTrainer

OUTCOMES = 2
"""Of what an outcome tells: those that an older package kept, which told less, are computed again."""
DECODED = 16
"""Bands that a worker keeps decoded."""


@dataclass(frozen=True, eq=False)
class Task:
    """What a device computes in a round, and all that it depends on.

    Attributes:
        name: of the device.
        directive: of the round.
        intro: how the device introduced itself.
        plan: by which it trains.
        plan_key: a digest of the plan and of the slot in `intro`.
        bands: payloads of the bands that it holds, in the order of the directive.
        data: examples of each class for the surrogate; numbers of its examples for real training.
        owed: what its updates owe; see `edge_runtime.state`.
        kept: what it keeps for itself.
        facts: that it remembers.
        personal: whether this is the end: its personal adapter, and no update.
        round_bytes: what a round may move up and down; None for as much as there is.
    """

    name: str
    directive: Directive
    intro: Introduction
    plan: Plan
    plan_key: str
    bands: tuple[bytes, ...]
    data: tuple[int, ...]
    owed: Blob | None = None
    kept: Blob | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    personal: bool = False
    round_bytes: int | None = None

    @cached_property
    def key(self) -> str:
        """SHA-256 of all of it."""
        total = hashlib.sha256()
        texts = (
            self.name, self.directive.model_dump_json(), self.plan_key, repr(self.data),
            json.dumps(self.facts, sort_keys=True), repr(self.personal), repr(self.round_bytes),
        )  # fmt: skip
        for part in (*(text.encode() for text in texts), whole(self.owed), whole(self.kept), *self.bands):
            total.update(b"-" if part is None else f"{len(part)}:".encode())
            total.update(part or b"")
        return total.hexdigest()

    def at_hand(self) -> Task:
        """The same with nothing on disk, as another process needs it."""
        return replace(self, owed=whole(self.owed), kept=whole(self.kept))


@dataclass(frozen=True)
class Done:
    """What came of it.

    Attributes:
        payload: the update; empty for a personal adapter.
        residual: what is owed once it is accepted.
        private: what the device keeps for itself from now on.
        facts: that it remembers from now on.
        examples: really used.
        loss_first: of the training.
        loss_last: of the training.
        held_out: of the version that it began from.
        personal: of its personal adapter; None in a round.
        accuracy: of the version that it began from: the share of the held-out completions' tokens that the model holds
            most likely; None for a surrogate, which says no tokens.
        personal_accuracy: likewise, of its personal adapter.
    """

    payload: Blob
    residual: Blob
    private: Blob | None
    facts: Mapping[str, Any]
    examples: int
    loss_first: float
    loss_last: float
    held_out: float
    personal: float | None = None
    accuracy: float | None = None
    personal_accuracy: float | None = None


class Judging(Trainer, Protocol):
    """The trainer of a simulated device."""

    @property
    def accuracy(self) -> float | None:
        """What the last `evaluate` found, as `Done` has it."""


class Workshop(Protocol):
    """Makes the trainers of devices in one process."""

    def trainer(self, task: Task) -> Judging:
        """Of the task's device; it need not outlive the next call."""


class Surrogates:
    """The workshop of the surrogate.

    Args:
        problem: the regression.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def trainer(self, task: Task) -> Judging:
        """A new one: it costs nothing."""
        return SurrogateTrainer(self._problem, task.intro, task.directive.adapter, task.name, task.data)


@dataclass(frozen=True)
class Recipe:
    """What a process must know before its first task.

    Attributes:
        simulation: the section of the fleet's file.
        eval_fraction: as of `edge_runtime.config.Device`.
        eval_examples: likewise.
    """

    simulation: Simulation
    eval_fraction: float = 0.15
    eval_examples: int = 24

    @property
    def digest(self) -> str:
        """SHA-256 of what outcomes depend on beside their task."""
        kept = {"seed", "trainer", "base", "data", "class_field", "classes", "surrogate", "precision", "threads"}
        texts = [self.simulation.model_dump_json(include=kept), f"{self.eval_fraction} {self.eval_examples} {OUTCOMES}"]
        total = hashlib.sha256("\n".join(texts).encode())
        for path in files_of(self.simulation):
            total.update(hashlib.sha256(path.read_bytes()).digest())
        return total.hexdigest()

    def workshop(self) -> Workshop:
        """The workshop of a process.

        Raises:
            MissingExtraError: real training, and no torch.
            EdgeRuntimeError: data or base that cannot be used.
        """
        if self.simulation.trainer == "surrogate":
            return Surrogates(problem_of(self.simulation))
        from simulation.real import RealTrainers  # noqa: PLC0415  torch belongs to an extra

        return RealTrainers(self)


def problem_of(simulation: Simulation) -> Problem:
    """The regression of a simulation."""
    return Problem(simulation.surrogate, simulation.classes, simulation.seed)


class Bench:
    """Where a process does its tasks; keeps what several of them share.

    Args:
        workshop: makes trainers.
    """

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop
        self._decoded: OrderedDict[str, Adapter] = OrderedDict()

    def do(self, task: Task) -> Done:
        """Do a task.

        Raises:
            EdgeRuntimeError: training failed.
        """
        # As many threads as elsewhere, or sums would be taken in another order.
        with one_thread():
            return self._done(task)

    def _done(self, task: Task) -> Done:
        directive, memory = task.directive, _Memory(task)
        bands = local_round.bands_of(directive, task.intro)
        found = [(band, self._band(band.blob.sha256, payload)) for band, payload in zip(bands, task.bands, strict=True)]
        adapter = local_round.received(directive, task.intro, found, memory)
        trainer = self._workshop.trainer(task)
        trainer.receive(adapter)
        held_out, accuracy = trainer.evaluate(), trainer.accuracy
        if task.personal and not directive.training.max_steps:
            return Done(b"", b"", None, {}, 0, held_out, held_out, held_out, held_out, accuracy, accuracy)
        if task.personal:
            result = trainer.train(directive.training, directive.round + 1, lambda _: None, lambda: False)
            numbers = (result.examples, result.loss_first, result.loss_last, held_out)
            return Done(b"", b"", None, {}, *numbers, trainer.evaluate(), accuracy, trainer.accuracy)
        made = local_round.contribute(directive, task.intro, adapter, trainer, memory, round_bytes=task.round_bytes)
        result = made.result
        facts = {**memory.written, **made.facts}
        numbers = (result.examples, result.loss_first, result.loss_last, held_out)
        return Done(made.payload, made.residual, made.private, facts, *numbers, accuracy=accuracy)

    def _band(self, sha256: str, payload: bytes) -> Adapter:
        found = self._decoded.pop(sha256, None) or codec.decode(payload)
        self._decoded[sha256] = found
        while len(self._decoded) > DECODED:
            self._decoded.popitem(last=False)
        return found


class _Memory:
    """Implements `edge_runtime.state.Memory` of a task."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.written: dict[str, Any] = {}

    @property
    def owed(self) -> bytes | None:
        """As the task says."""
        return whole(self._task.owed)

    @property
    def kept(self) -> bytes | None:
        """As the task says."""
        return whole(self._task.kept)

    def fact(self, name: str) -> Any:
        """The newest."""
        return self.written.get(name, self._task.facts.get(name))

    def put_fact(self, name: str, value: Any) -> None:
        """To be remembered."""
        # As a device's disk would give it back.
        self.written[name] = json.loads(json.dumps(value))
