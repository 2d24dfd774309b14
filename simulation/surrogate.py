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

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError, RoundError
from edge_runtime.lora.adapter import Adapter, LayerSlot, Pair, Slot
from edge_runtime.lora.algebra import change, take
from edge_runtime.lora.slices import Scores
from edge_runtime.schedule import rate_at
from edge_runtime.trainer import AdapterSpec, Gate, Introduction, LocalResult, StepReport, Texts, Training
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
        flat = self.targets.reshape(self.classes, -1)
        return np.asarray((shares @ flat).reshape(self.targets.shape[1:]), np.float64)

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


def unsimulated(personal: Adapter | None) -> None:
    """Refuse what simulated devices do not do.

    Raises:
        ConfigError: personal training in another way than from the global adapter on.
    """
    if personal is not None:
        raise ConfigError("simulated devices fine-tune from the global adapter on; take [personal] way = 'finetune'")


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

    @property
    def accuracy(self) -> None:
        """There is none: a regression says no tokens."""

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

    def evaluate(self, texts: Texts = "reported") -> float:  # noqa: ARG002 - it has one kind
        """The loss on the device's own mixture of classes."""
        return self._problem.loss(self._whole(), self._shares)

    def train(
        self,
        training: Training,
        round_number: int,
        on_step: Callable[[StepReport], None],
        gate: Gate,
        personal: Adapter | None = None,
    ) -> LocalResult:
        """AdamW for `max_steps`.

        Raises:
            ConfigError: it is to be personal in a way that is not simulated.
            RoundError: the loss is not finite.
            KeyboardInterrupt: the gate said stop.
        """
        unsimulated(personal)
        problem, draw = self._problem, named(self._problem.seed, "training", self._name, round_number, training.seed)
        before, first = dict(self._trained), self.evaluate()
        frozen, stacks = self._whole() - problem.dense(Adapter(before)), self._stacks()
        rate, last = training.learning_rate * self._reach(training), first
        for step in range(training.max_steps):
            if gate():
                raise KeyboardInterrupt
            missing = frozen - problem.mean(draw.multinomial(training.batch_size, self._shares) / training.batch_size)
            for stack in stacks:
                missing[stack.layers] += stack.product()
            last = float((missing**2).sum() / len(missing) / 2)
            if not np.isfinite(last):
                raise RoundError(f"'{self._name}': the loss of step {step + 1} is {last}; lower the learning rate")
            if problem.settings.noise:
                size = np.sqrt((missing**2).sum(axis=(1, 2), keepdims=True)) / problem.settings.width
                missing += problem.settings.noise * size * draw.standard_normal(missing.shape, np.float32)
            share = rate_at(
                step, steps=training.max_steps, warmup_steps=training.warmup_steps, schedule=training.schedule
            )
            _descend(stacks, missing, training, rate * share, step + 1)
            on_step(StepReport(step + 1, training.max_steps, last))
        for stack in stacks:
            self._trained.update({problem.names[at]: pair for at, pair in stack.pairs()})
        moved = Adapter({name: change(self._trained[name], pair) for name, pair in before.items()})
        return LocalResult(moved, self._plan.examples, first, last)

    def _stacks(self) -> list[_Stack]:
        """The trained slice, the layers of one rank together: a small layer alone costs as much as all of them."""
        ranks: dict[int, list[int]] = {}
        for at, name in enumerate(self._problem.names):
            if name in self._trained:
                ranks.setdefault(self._trained[name].rank, []).append(at)
        return [_Stack(layers, [self._trained[self._problem.names[at]] for at in layers]) for layers in ranks.values()]

    def _reach(self, training: Training) -> float:
        """How much larger the rate of a device of few directions is; see `edge_runtime.train.tasks.rate_of`."""
        rank = max(self._plan.slot.trained.values(), default=self._spec.max_rank)
        return float(max(1.0, self._spec.max_rank / rank) ** training.rate_exponent)

    def _whole(self) -> Wide:
        """What the live model adds to its base, trained slice and frozen rest together."""
        found = {}
        for name, pair in self._received.items():
            a, b, rows = pair.a.copy(), pair.b.copy(), self._rows.get(name, [])
            if rows:
                a[rows], b[:, rows] = self._trained[name].a, self._trained[name].b
            found[name] = Pair(a, b)
        return self._problem.dense(Adapter(found))


class _Stack:
    """The trained slices of layers that have the same rank r, and Adam's moments of them.

    Args:
        layers: their numbers, n of them.
        pairs: what begins there.
    """

    def __init__(self, layers: Sequence[int], pairs: Sequence[Pair]) -> None:
        self.layers = list(layers)
        # Of shape (n, r, width), and (n, width, r).
        self.factors = [
            np.stack([p.a for p in pairs]).astype(np.float64),
            np.stack([p.b for p in pairs]).astype(np.float64),
        ]
        self._first = [np.zeros_like(factor) for factor in self.factors]
        self._second = [np.zeros_like(factor) for factor in self.factors]

    def product(self) -> Wide:
        """(n, width, width)."""
        return np.asarray(self.factors[1] @ self.factors[0], np.float64)

    def gradients(self, missing: Wide, factors: str) -> list[Wide]:
        """Of both factors, zero for one that is not trained; `missing` is that of all layers."""
        a, b = self.factors
        here = missing[self.layers]
        down_a = b.transpose(0, 2, 1) @ here if "a" in factors else np.zeros_like(a)
        down_b = here @ a.transpose(0, 2, 1) if "b" in factors else np.zeros_like(b)
        return [down_a, down_b]

    def step(self, gradients: Sequence[Wide], rates: Sequence[float], decay: float, number: int) -> None:
        """One of AdamW; `number` counts from 1."""
        for index, (gradient, rate) in enumerate(zip(gradients, rates, strict=True)):
            first, second, factor = self._first[index], self._second[index], self.factors[index]
            first += (1 - BETAS[0]) * (gradient - first)
            second += (1 - BETAS[1]) * (gradient * gradient - second)
            factor *= 1.0 - rate * decay
            even = np.sqrt(second / (1 - BETAS[1] ** number)) + TINY
            factor -= (rate / (1 - BETAS[0] ** number)) * (first / even)

    def pairs(self) -> Iterator[tuple[int, Pair]]:
        """Number of the layer, and its slice."""
        a, b = (factor.astype(np.float32) for factor in self.factors)
        for index, layer in enumerate(self.layers):
            yield layer, Pair(a[index], b[index])


def _descend(stacks: Sequence[_Stack], missing: Wide, training: Training, rate: float, number: int) -> None:
    """A step of all of them, their gradients clipped together."""
    gradients = [stack.gradients(missing, training.factors) for stack in stacks]
    size = math.sqrt(sum(float((gradient * gradient).sum()) for both in gradients for gradient in both))
    clip = min(1.0, training.max_grad_norm / (size + TINY))
    rates = [
        rate * ("a" in training.factors),
        rate * training.lora_plus_ratio * ("b" in training.factors),
    ]
    for stack, both in zip(stacks, gradients, strict=True):
        stack.step([clip * gradient for gradient in both], rates, training.weight_decay, number)
