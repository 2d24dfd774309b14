"""A regression that stands for a base model: low-rank targets with a known optimum, and differences that one sets.

Each class c of examples asks for the change W_c = S + h·E_c of every layer: S is common to all, E_c is the class's own,
both of the rank that is set, of Frobenius norm 1 and drawn from the seed. With the change Δ of all layers, the loss of
an example of class c is the mean over layers of ||Δ - W_c||² / 2. A device with shares q of the classes has the target
W_q = sum_c q_c W_c, and the fleet that of its shares: the best loss that a full-rank adapter can have is known exactly.

Training is AdamW on the factors of the trained slice, the rest of what the device holds frozen, as in the real trainer:
rates, schedule, warm-up and clipping are those of the Directive. A step sees a batch of the device's classes, so that
gradients are noisy as those of examples are; `noise` adds more. There is no torch in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import RoundError
from edge_runtime.lora.adapter import Adapter, LayerSlot, Pair, Slot
from edge_runtime.lora.algebra import change, take
from edge_runtime.lora.slices import Scores
from edge_runtime.train.schedule import rate_at
from edge_runtime.trainer import AdapterSpec, Gate, Introduction, LocalResult, StepReport, Training
from simulation.draws import named
from simulation.settings import Surrogate

BETAS, TINY = (0.9, 0.999), 1e-8
"""Of Adam."""

Wide = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """The regression of one simulation.

    Attributes:
        settings: how large it is, and how far classes are apart.
        classes: of examples.
        seed: of the simulation.
    """

    settings: Surrogate
    classes: int
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """The layers, first to last."""
        return tuple(f"model.layers.{index}.self_attn.q_proj" for index in range(self.settings.layers))

    @cached_property
    def targets(self) -> Wide:
        """(classes, layers, width, width): what each class asks for."""
        own = np.stack([self._drawn(f"class {index}") for index in range(self.classes)])
        return np.asarray(self._drawn("shared")[None] + self.settings.heterogeneity * own, np.float64)

    def _drawn(self, what: str) -> Wide:
        layers, width, rank = self.settings.layers, self.settings.width, min(self.settings.rank, self.settings.width)
        draw = named(self.seed, "surrogate", what)
        found = draw.standard_normal((layers, width, rank)) @ draw.standard_normal((layers, rank, width))
        return np.asarray(found / np.linalg.norm(found, axis=(1, 2), keepdims=True), np.float64)

    @cached_property
    def _squares(self) -> Wide:
        """(classes,): mean over layers of ||W_c||²."""
        return np.asarray((self.targets**2).sum(axis=(2, 3)).mean(axis=1), np.float64)

    def mean(self, shares: Wide) -> Wide:
        """(layers, width, width): the target of that mixture of classes."""
        return np.asarray(np.tensordot(shares, self.targets, axes=1), np.float64)

    def loss(self, whole: Wide, shares: Wide) -> float:
        """Of the change (layers, width, width) on a mixture of classes."""
        apart = ((whole - self.mean(shares)) ** 2).sum(axis=(1, 2)).mean()
        return float(apart / 2 + self.floor(shares))

    def floor(self, shares: Wide) -> float:
        """The loss of the best change for a mixture of classes: what differs between them, nobody can learn."""
        best = (self.mean(shares) ** 2).sum(axis=(1, 2)).mean()
        return float(max(0.0, shares @ self._squares - best) / 2)

    def dense(self, adapter: Adapter) -> Wide:
        """(layers, width, width): the change that an adapter is; zero in layers that it lacks."""
        width = self.settings.width
        none = np.zeros((width, width))
        pairs = [adapter.get(name) for name in self.names]
        return np.stack([none if p is None else p.b.astype(np.float64) @ p.a for p in pairs])

    def slot(self, rank: int, held: int, layers_trained: float) -> Slot:
        """What a device with that plan holds and trains of this problem.

        Args:
            rank: directions that it trains.
            held: directions that it holds.
            layers_trained: share of the layers, the last ones.
        """
        layers, width = self.settings.layers, self.settings.width
        first = layers - max(1, round(layers * layers_trained))
        rank, held = min(rank, width), min(max(rank, held), width)
        return Slot({n: LayerSlot(width, width, held, rank if i >= first else 0) for i, n in enumerate(self.names)})


class SurrogateTrainer:
    """Implements `edge_runtime.trainer.Trainer` for one device of the regression.

    Args:
        problem: the regression.
        plan: what the device said of itself.
        spec: what the fleet shares.
        name: of the device; what is left to chance is drawn from it.
        examples: (classes,) that it has.
    """

    def __init__(
        self, problem: Problem, plan: Introduction, spec: AdapterSpec, name: str, examples: Sequence[int]
    ) -> None:
        self._problem, self._plan, self._spec, self._name = problem, plan, spec, name
        total = sum(examples)
        self._shares = np.asarray(examples, np.float64) / total
        self._received = Adapter({})
        self._rows: dict[str, list[int]] = {}
        self._trained: dict[str, Pair] = {}

    @property
    def peak_bytes(self) -> int:
        """Nothing to speak of."""
        return 0

    def introduce(
        self, spec: AdapterSpec, training: Training, ceiling: int | None, on_plan: Callable[[int], None]
    ) -> Introduction:
        """What it was made with: the plan is the simulated device's."""
        del spec, training, ceiling, on_plan
        return self._plan

    def receive(self, adapter: Adapter, rows: Mapping[str, Sequence[int]] | None = None) -> None:
        """Begin from this."""
        trained = self._plan.slot.trained
        chosen = rows or {name: range(min(trained.get(name, 0), pair.rank)) for name, pair in adapter.items()}
        self._received, self._rows = adapter, {name: list(found) for name, found in chosen.items() if len(found)}
        self._trained = {name: take(adapter[name], found) for name, found in self._rows.items()}

    def scores(self) -> Mapping[str, Scores]:
        """How much of what is missing lies along each direction: |uᵢᵀ E vᵢ|."""
        missing = self._whole() - self._problem.mean(self._shares)
        found = {}
        for index, name in enumerate(self._problem.names):
            pair = self._received[name]
            norms = np.linalg.norm(pair.a, axis=1) * np.linalg.norm(pair.b, axis=0)
            along = np.abs(np.einsum("oi,od,id->i", pair.b, missing[index], pair.a))
            found[name] = np.asarray(along / np.where(norms > 0, norms, 1), np.float64)
        return found

    def evaluate(self) -> float:
        """The loss on the device's own mixture of classes."""
        return self._problem.loss(self._whole(), self._shares)

    def train(
        self, training: Training, round_number: int, on_step: Callable[[StepReport], None], gate: Gate
    ) -> LocalResult:
        """AdamW for `max_steps`.

        Raises:
            RoundError: the loss is not finite.
            KeyboardInterrupt: the gate said stop.
        """
        problem, draw = self._problem, named(self._problem.seed, "training", self._name, round_number, training.seed)
        before = dict(self._trained)
        frozen = self._whole() - self._slice()
        rate = training.learning_rate * self._reach(training)
        moments = {name: _Moments(pair) for name, pair in before.items()}
        first = last = self.evaluate()
        for step in range(training.max_steps):
            if gate():
                raise KeyboardInterrupt
            shares = draw.multinomial(training.batch_size, self._shares) / training.batch_size
            missing = frozen + self._slice() - problem.mean(shares)
            noise = problem.settings.noise * draw.standard_normal(missing.shape) / problem.settings.width
            missing += noise * np.linalg.norm(missing, axis=(1, 2), keepdims=True)
            share = rate_at(
                step, steps=training.max_steps, warmup_steps=training.warmup_steps, schedule=training.schedule
            )
            self._step(missing, moments, training, rate * share, step + 1)
            last = float((missing**2).sum(axis=(1, 2)).mean() / 2)
            if not np.isfinite(last):
                raise RoundError(f"'{self._name}': the loss of step {step + 1} is {last}; lower the learning rate")
            on_step(StepReport(step + 1, training.max_steps, last))
        moved = Adapter({name: change(self._trained[name], pair) for name, pair in before.items()})
        return LocalResult(moved, self._plan.examples, first, self.evaluate() if training.max_steps else last)

    def _reach(self, training: Training) -> float:
        """How much larger the rate of a device of few directions is; see `edge_runtime.train.tasks.rate_of`."""
        rank = max(self._plan.slot.trained.values(), default=self._spec.max_rank)
        return float(max(1.0, self._spec.max_rank / rank) ** training.rate_exponent)

    def _step(
        self, missing: Wide, moments: Mapping[str, _Moments], training: Training, rate: float, number: int
    ) -> None:
        gradients: dict[str, tuple[Wide, Wide]] = {}
        for index, name in enumerate(self._problem.names):
            if name in self._trained:
                a, b = self._trained[name].a.astype(np.float64), self._trained[name].b.astype(np.float64)
                gradients[name] = (
                    ("a" in training.factors) * (b.T @ missing[index]),
                    ("b" in training.factors) * (missing[index] @ a.T),
                )
        size = float(np.sqrt(sum(float((g**2).sum()) for both in gradients.values() for g in both)))
        clip = min(1.0, training.max_grad_norm / (size + 1e-6))
        decay = 1.0 - rate * training.weight_decay
        for name, (down_a, down_b) in gradients.items():
            step_a, step_b = moments[name].step(clip * down_a, clip * down_b, number)
            pair = self._trained[name]
            a = pair.a * (decay if "a" in training.factors else 1.0) - rate * step_a
            b = pair.b * (decay if "b" in training.factors else 1.0) - rate * training.lora_plus_ratio * step_b
            self._trained[name] = Pair(a.astype(np.float32), b.astype(np.float32))

    def _whole(self) -> Wide:
        """What the live model adds to its base, trained slice and frozen rest together."""
        found = {}
        for name, pair in self._received.items():
            a, b, rows = pair.a.copy(), pair.b.copy(), self._rows.get(name, [])
            if rows:
                a[rows], b[:, rows] = self._trained[name].a, self._trained[name].b
            found[name] = Pair(a, b)
        return self._problem.dense(Adapter(found))

    def _slice(self) -> Wide:
        return self._problem.dense(Adapter(self._trained))


class _Moments:
    """Adam's, of one pair."""

    def __init__(self, pair: Pair) -> None:
        self._first = np.zeros(pair.a.shape), np.zeros(pair.b.shape)
        self._second = np.zeros(pair.a.shape), np.zeros(pair.b.shape)

    def step(self, down_a: Wide, down_b: Wide, number: int) -> tuple[Wide, Wide]:
        """Which way each factor goes, for a rate of 1; `number` counts steps from 1."""
        steps = []
        for index, gradient in enumerate((down_a, down_b)):
            first, second = self._first[index], self._second[index]
            first += (1 - BETAS[0]) * (gradient - first)
            second += (1 - BETAS[1]) * (gradient**2 - second)
            even = np.sqrt(second / (1 - BETAS[1] ** number)) + TINY
            steps.append(first / (1 - BETAS[0] ** number) / even)
        return steps[0], steps[1]
