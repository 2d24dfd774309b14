"""A device whose model is one matrix for each layer: the whole protocol can be tested without torch.

A layer's loss is the mean square of (change - target), so the best global adapter is known: the mean of the devices'
targets, weighted by their examples. Training is plain gradient descent on the factors of the trained slice, with the
rest of what the device holds frozen. There is no chance in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from edge_runtime.errors import DeviceMemoryError, PlanError, RoundError
from edge_runtime.lora.adapter import Adapter, LayerSlot, Matrix, Pair, Slot
from edge_runtime.lora.algebra import change, take
from edge_runtime.lora.pruning import stays
from edge_runtime.lora.slices import Scores
from edge_runtime.trainer import AdapterSpec, Gate, Introduction, LocalResult, StepReport, Texts, Training

SHAPES: Mapping[str, tuple[int, int]] = {
    f"model.layers.{index}.self_attn.{module}": shape
    for index, module, shape in ((0, "q_proj", (12, 16)), (1, "v_proj", (10, 16)))
}
BASE = "b" * 64
RANK_BYTES = 1000
"""What a toy believes that each trained direction takes at its peak."""
Targets = Mapping[str, Matrix]


def targets(seed: int = 0, rank: int = 4, size: float = 1.0) -> Targets:
    """A random target of that rank and Frobenius norm for every layer."""
    draw = np.random.default_rng(seed)
    found = {}
    for name, (d_out, d_in) in SHAPES.items():
        whole = draw.standard_normal((d_out, rank)) @ draw.standard_normal((rank, d_in))
        found[name] = (size * whole / np.linalg.norm(whole)).astype(np.float32)
    return found


def optimum(devices: Iterable[ToyTrainer]) -> Targets:
    """The change with the lowest loss over all examples of these devices."""
    known = list(devices)
    total = sum(device.examples for device in known)
    return {
        name: np.asarray(sum(d.examples / total * d.targets[name].astype(np.float64) for d in known), np.float32)
        for name in SHAPES
    }


def distance(adapter: Adapter, goal: Targets) -> float:
    """How far an adapter is from a goal, relative to the goal's norm, all layers together."""
    apart = sum(float(np.sum((adapter[name].product() - wanted) ** 2)) for name, wanted in goal.items())
    return float(np.sqrt(apart / sum(float(np.sum(wanted**2)) for wanted in goal.values())))


class ToyTrainer:
    """Implements `edge_runtime.trainer.Trainer`.

    Args:
        goal: this device's own targets.
        rank: what it trains.
        held: what it holds, where the fleet permits that it holds more than it trains.
        examples: its weight.
        base: fingerprint that it claims.
        bears: the largest rank that it can really train; a larger one runs out of memory in the second step.
    """

    def __init__(
        self,
        goal: Targets,
        *,
        rank: int,
        held: int = 64,
        examples: int = 10,
        base: str = BASE,
        bears: int | None = None,
    ) -> None:
        self.targets, self.examples, self.bears = goal, examples, bears
        self._most = rank
        self._rank, self._held, self._base = rank, held, base
        self._received = Adapter({})
        self._trained: dict[str, Pair] = {}
        self._rows: dict[str, Sequence[int]] = {}
        self.slices: list[Mapping[str, tuple[int, ...]]] = []
        self.scored = 0
        self.chooses: Callable[[ToyTrainer], float] | None = None
        self.personal: list[Adapter | None] = []
        self.rounds: list[int] = []
        self.specs: list[AdapterSpec] = []
        self.ceilings: list[int | None] = []

    @property
    def peak_bytes(self) -> int:
        """Nothing to speak of."""
        return 0

    @property
    def live(self) -> Adapter:
        """What the live model adds to its base, trained slice and frozen rest together."""
        return Adapter({name: self._whole(name) for name in self._received})

    def introduce(
        self, spec: AdapterSpec, training: Training, ceiling: int | None, on_plan: Callable[[int], None]
    ) -> Introduction:
        """The ranks it was made with, within what the fleet permits and what stays below the ceiling."""
        del training  # a toy's rank does not depend on how its rounds train
        self.specs.append(spec)
        self.ceilings.append(ceiling)
        fitting = self._most if ceiling is None else min(self._most, ceiling // RANK_BYTES)
        if fitting < 1:
            raise PlanError(f"a direction takes {RANK_BYTES} bytes; found a ceiling of {ceiling}")
        self._rank = spec.max_rank if spec.equal_ranks else fitting
        on_plan(RANK_BYTES * min(self._rank, spec.max_rank))
        trained = min(self._rank, spec.max_rank)
        held = max(trained, min(self._held, spec.max_held)) if spec.hold_more else trained
        slot = Slot(
            {
                name: LayerSlot(
                    d_out, d_in, min(spec.beside, d_out, d_in) + min(held, d_out, d_in), min(trained, d_out, d_in)
                )
                for name, (d_out, d_in) in SHAPES.items()
            }
        )
        return Introduction(
            slot=slot,
            base=self._base,
            examples=self.examples,
            device="toy",
            precision="fp32",
            plan=f"train {trained}, hold {held}",
            software="numpy",
            choosing=int(self.chooses is not None),
        )

    def receive(self, adapter: Adapter, rows: Mapping[str, Sequence[int]] | None = None) -> None:
        """Begin from this."""
        self._received = adapter
        own = self.specs[-1].own if self.specs else 0
        self._rows = dict(rows or {name: range(min(self._rank + own, pair.rank)) for name, pair in adapter.items()})
        self._trained = {name: take(adapter[name], found) for name, found in self._rows.items()}
        self.slices.append({name: tuple(found) for name, found in self._rows.items()})

    def scores(self) -> Mapping[str, Scores]:
        """Of the gradient of a layer's loss, which is what is missing: |uᵢᵀ E vᵢ|."""
        self.scored += 1
        return {name: self._score(name, pair) for name, pair in self._received.items()}

    def _score(self, name: str, pair: Pair) -> Scores:
        error = (self._whole(name).product() - self.targets[name]).astype(np.float64)
        norms = np.linalg.norm(pair.a, axis=1) * np.linalg.norm(pair.b, axis=0)
        found = np.abs(np.einsum("oi,od,id->i", pair.b, error, pair.a))
        return np.asarray(found / np.where(norms > 0, norms, 1), np.float64)

    def evaluate(self, texts: Texts = "reported") -> float:
        """Mean square of what is missing; a toy has no texts, and what chooses may be made to disagree."""
        if texts == "choosing" and self.chooses is not None:
            return self.chooses(self)
        apart = [np.mean((self._whole(name).product() - wanted) ** 2) for name, wanted in self.targets.items()]
        return float(np.mean(apart))

    def train(
        self,
        training: Training,
        round_number: int,
        on_step: Callable[[StepReport], None],
        gate: Gate,
        personal: Adapter | None = None,
    ) -> LocalResult:
        """Gradient descent at `learning_rate` for `max_steps`."""
        self.rounds.append(round_number)
        self.personal.append(personal)
        before = dict(self._trained)
        first = self.evaluate()
        for step in range(training.max_steps):
            if gate():
                raise KeyboardInterrupt
            if step == 1 and self.bears is not None and self._rank > self.bears:
                raise DeviceMemoryError(f"rank {self._rank} is more than this toy can bear")
            for name, wanted in self.targets.items():
                error = self._whole(name).product() - wanted
                a, b = self._trained[name].a, self._trained[name].b
                down_a = training.learning_rate * ("a" in training.factors) * (b.T @ error)
                down_b = training.learning_rate * ("b" in training.factors) * (error @ a.T)
                if training.tail_penalty and training.kept < 1:
                    start = stays(len(a), training.kept)
                    down_a[start:] += training.learning_rate * training.tail_penalty * a[start:]
                    down_b[:, start:] += training.learning_rate * training.tail_penalty * b[:, start:]
                self._trained[name] = Pair((a - down_a).astype(np.float32), (b - down_b).astype(np.float32))
            loss = self.evaluate()
            if not np.isfinite(loss):
                raise RoundError(f"the loss of step {step + 1} is {loss}; lower the learning rate")
            on_step(StepReport(step + 1, training.max_steps, loss))
        moved = Adapter({name: change(self._trained[name], pair) for name, pair in before.items()})
        return LocalResult(moved, self.examples, first, self.evaluate())

    def _whole(self, name: str) -> Pair:
        trained, held = self._trained[name], self._received[name]
        a, b, rows = held.a.copy(), held.b.copy(), list(self._rows[name])
        a[rows], b[:, rows] = trained.a, trained.b
        return Pair(a, b)
