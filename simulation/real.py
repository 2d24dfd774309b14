"""Real training for simulated devices: one base model in a process, in which only adapters change.

Every device's round begins from what it received, as in `edge_runtime.train.local`, and its plan is that of the device
that is simulated. A base is loaded once for each precision that the plans ask for, or at one for all. Its adapter makes
room for another one when a device of another rank trains: 64 devices take the memory of one.

Nothing of a device outlives its round, so what devices carry from round to round beside their adapter (moments of the
optimiser, a drift to correct) is not simulated, and refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edge_runtime.config import cache_dir
from edge_runtime.errors import ConfigError, DataError, DeviceMemoryError
from edge_runtime.lora.adapter import Adapter, Slot
from edge_runtime.lora.algebra import change
from edge_runtime.lora.slices import Scores
from edge_runtime.train import cores, data, evaluating, families, loop, own_texts, token_cache
from edge_runtime.train.alignment import scores
from edge_runtime.train.base import LoadedBase, load, prepare
from edge_runtime.train.live import LiveModel
from edge_runtime.train.placing import place
from edge_runtime.train.planning import slot_of
from edge_runtime.train.receiving import Received, fitted, receive, slot_for
from edge_runtime.train.regaining import regained_at
from edge_runtime.train.tasks import task_of
from edge_runtime.train.terms import Term, proximal, tail
from edge_runtime.trainer import Gate, Introduction, LocalResult, StepReport, Texts, Training
from profiles.find_card import find_card
from profiles.plan import Plan
from simulation import examples
from simulation.surrogate import unsimulated
from simulation.work import Recipe, Task

TOKENISED = 128
"""Devices whose tokens a process keeps."""
COMPUTE: Mapping[str, str] = {"bf16": "bf16", "fp32": "fp32"}
"""Precision of a plain base → that of its activations."""

Tokens = tuple[Sequence[data.Tokenised], Sequence[data.Tokenised]]


@dataclass(eq=False)
class Loaded:
    """A base in memory, and the adapter that is in it now.

    Attributes:
        base: of transformers.
        live: None before the first device.
    """

    base: LoadedBase
    live: LiveModel | None = None


class RealTrainers:
    """The workshop of one process.

    Args:
        recipe: of the simulation.

    Raises:
        DataError: examples that cannot be read.
        BaseModelError: no such base.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._simulation = recipe, recipe.simulation
        # As many in every engine, or sums would be taken in another order.
        self._device = place(recipe.simulation.threads)
        self._card = find_card(recipe.simulation.base)
        self._examples, _ = examples.load(recipe.simulation)
        self._bases: dict[tuple[str, str, str, int], Loaded] = {}
        self._tokens: OrderedDict[tuple[tuple[int, ...], int], Tokens] = OrderedDict()

    def trainer(self, task: Task) -> SharedTrainer:
        """Of the task's device, in the base of its precision.

        Raises:
            DataError: nothing to learn is left of its examples.
            ConfigError: the fleet asks for what is carried from round to round.
        """
        training = task.directive.training
        if training.carry_moments or training.correction:
            raise ConfigError(
                "a simulated device carries nothing from round to round beside its adapter; set [training] "
                "carry_moments = false and correction = 0"
            )
        spec, plan = task.directive.adapter, task.plan
        slot = slot_of(plan, self._card, spec)
        loaded, family = self._loaded(plan, spec.regained), families.get(spec.family)
        if loaded.live is None:
            base = cores.inserted(loaded.base.model, slot)
            loaded.live = family.attach(base, slot, scaling=spec.scaling)
        return SharedTrainer(task, loaded, slot, self._tokens_of(task, loaded.base))

    def _loaded(self, plan: Plan, regained: int) -> Loaded:
        precision, compute, products = plan.precision, plan.compute_dtype, plan.product_dtype
        if self._simulation.precision is not None:
            precision = self._simulation.precision
            compute = COMPUTE.get(precision, compute)
            products = compute if precision in COMPUTE else products
        beside = regained_at(precision, regained)
        key = (precision, compute, products, beside)
        if key not in self._bases:
            found = prepare(self._simulation.base, precision=precision, regained=beside, cache=cache_dir())
            base = load(found, compute_dtype=compute, product_dtype=products, device=self._device)
            self._bases[key] = Loaded(base)
        return self._bases[key]

    def _tokens_of(self, task: Task, base: LoadedBase) -> Tokens:
        key = (task.data, task.plan.max_length)
        if key in self._tokens:
            self._tokens.move_to_end(key)
            return self._tokens[key]
        mine = [self._examples[number] for number in task.data]
        texts = own_texts.parts_of(mine, self._recipe.eval_fraction, self._recipe.eval_examples)
        parts = tuple(
            token_cache.tokens_of(part, base.tokenizer, task.plan.max_length, cache=None, say=lambda _: None).examples
            for part in (texts.train, texts.reported)
        )
        if not all(parts):
            raise DataError(
                f"'{task.name}': no example has a completion within {task.plan.max_length} tokens; give shorter "
                "examples, or raise adapter.max_length in the fleet's file"
            )
        self._tokens[key] = parts[0], parts[1]
        while len(self._tokens) > TOKENISED:
            self._tokens.popitem(last=False)
        return self._tokens[key]


class SharedTrainer:
    """Implements `edge_runtime.trainer.Trainer` for one device, in a model that others use after it.

    Args:
        task: of the device.
        loaded: the base, with an adapter of any rank in it.
        slot: what the device holds and trains.
        tokens: its examples, those to train on and those held out.
    """

    def __init__(self, task: Task, loaded: Loaded, slot: Slot, tokens: Tokens) -> None:
        self._task, self._loaded, self._slot = task, loaded, slot
        self._train, self._held_out = tokens
        self._family = families.get(task.directive.adapter.family)
        self._received: Received | None = None
        self._accuracy: float | None = None

    @property
    def accuracy(self) -> float | None:
        """Share of the held-out completions' tokens that the model held most likely at the last `evaluate`."""
        return self._accuracy

    @property
    def peak_bytes(self) -> int:
        """That of a simulated device is its plan's."""
        return self._task.plan.predicted_peak_bytes

    @property
    def _live(self) -> LiveModel:
        if self._loaded.live is None:
            raise DataError("there is no model yet; report this as a bug")
        return self._loaded.live

    def introduce(
        self, spec: object, training: object, ceiling: int | None, on_plan: Callable[[int], None]
    ) -> Introduction:
        """As it did."""
        del spec, training, ceiling, on_plan
        return self._task.intro

    def receive(self, adapter: Adapter, rows: Mapping[str, Sequence[int]] | None = None) -> None:
        """Put the global adapter, cut to what the slot holds, into the shared model."""
        self._loaded.live = fitted(self._live, self._family, slot_for(self._slot, rows, adapter.ranks))
        self._received = receive(self._live, self._family, adapter, rows)

    def scores(self) -> Mapping[str, Scores]:
        """How much each direction of what was received matters to this device's examples."""
        plan = self._task.plan
        one = Training(
            max_steps=1, learning_rate=1.0, batch_size=plan.micro_batch * plan.gradient_accumulation_steps,
            warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, seed=0,
        )  # fmt: skip
        return scores(self._live, self._train, task_of(one, 0, plan, self._task.directive.adapter))

    def evaluate(self, texts: Texts = "reported") -> float:  # noqa: ARG002 - it has one kind
        """Mean completion loss on the held-out examples, nats per token."""
        found = evaluating.evaluate(self._live, self._held_out, count_right=True)
        self._accuracy = found.accuracy
        return found.loss

    def train(
        self,
        training: Training,
        round_number: int,
        on_step: Callable[[StepReport], None],
        gate: Gate,
        personal: Adapter | None = None,
    ) -> LocalResult:
        """One local round from what was received.

        Raises:
            ConfigError: it is to be personal in a way that is not simulated.
            DeviceMemoryError: this machine's memory ran out.
            RoundError: the loss is not finite.
            KeyboardInterrupt: the gate said stop.
        """
        unsimulated(personal)
        received = self._received
        if received is None:
            raise DataError("nothing was received yet; receive() comes first")
        asked = task_of(training, round_number, self._task.plan, self._task.directive.adapter)
        result = loop.train_round(
            self._live, self._train, asked,
            on_step=lambda at: on_step(StepReport(at.step, at.steps, at.loss)), should_stop=gate,
            terms=self._terms(training, received),
        )  # fmt: skip
        if result.failure:
            raise DeviceMemoryError(f"'{self._task.name}': {result.failure}; simulate with fewer workers")
        if not result.finished:
            raise KeyboardInterrupt
        trained = self._family.read_trained(self._live)
        moved = {name: change(pair, received.before[name]) for name, pair in trained.items()}
        return LocalResult(Adapter(moved), result.examples, result.loss_first, result.loss_last)

    def _terms(self, training: Training, received: Received) -> list[Term]:
        scaling = self._live.scaling
        found = [tail(training.kept, training.tail_penalty, scaling)] if training.tail_penalty else []
        if training.proximal:
            found.append(proximal(received.before, training.proximal, scaling))
        return found
