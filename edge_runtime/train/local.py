"""The real trainer: probe, plan, load the 4-bit base, train and evaluate on this device's own examples."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import re
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from edge_runtime.errors import DataError
from edge_runtime.lora.adapter import Adapter, LayerSlot, Slot
from edge_runtime.lora.algebra import change, take
from edge_runtime.train import data, loop
from edge_runtime.train.base import LoadedBase, PreparedBase, load, prepare
from edge_runtime.train.bounds import bound_primitive_cache
from edge_runtime.train.families import get
from edge_runtime.train.live import LiveModel
from edge_runtime.trainer import AdapterSpec, Introduction, LocalResult, StepReport, Training
from profiles.card import ModelCard, card_from_config
from profiles.plan import Plan, plan
from profiles.probe import probe

RANKS = (2, 4, 8, 16, 32, 64)
"""Ranks that a plan chooses from, up to the fleet's largest."""

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class LocalSettings:
    """What this device brings.

    Attributes:
        base: alias, hub id, folder or GGUF file.
        examples: its own examples.
        eval_fraction: share of them held out, always the same ones.
        eval_examples: held-out examples that are really evaluated, at most.
        memory_limit: bytes that training may use, below what the machine allows; None for no such limit.
        threads: CPU threads; None lets the plan say.
        batch_size: examples of one optimiser step, for the plan.
        cache: where converted bases are kept.
    """

    base: str
    examples: Sequence[data.Example]
    eval_fraction: float
    eval_examples: int
    memory_limit: int | None
    threads: int | None
    batch_size: int
    cache: Path


@dataclass(frozen=True, eq=False)
class Ready:
    """A trainer that has planned: the plan, the live model, and its examples as tokens."""

    plan: Plan
    card: ModelCard
    spec: AdapterSpec
    slot: Slot
    base: LoadedBase
    live: LiveModel
    train: tuple[data.Tokenised, ...]
    held_out: tuple[data.Tokenised, ...]


class LocalTrainer:
    """Implements `edge_runtime.trainer.Trainer` with torch.

    Args:
        settings: what this device brings.
        say: told a sentence for people.
        should_stop: asked between micro-batches; a yes raises KeyboardInterrupt, and nothing is half done.
    """

    def __init__(
        self,
        settings: LocalSettings,
        *,
        say: Callable[[str], None],
        should_stop: Callable[[], bool],
    ) -> None:
        bound_primitive_cache(os.environ)
        self._settings, self._say, self._should_stop = settings, say, should_stop
        self._ready: Ready | None = None
        self._received: Adapter | None = None

    @property
    def ready(self) -> Ready:
        """What `introduce` made.

        Raises:
            DataError: it was not called yet.
        """
        if self._ready is None:
            raise DataError("the trainer has not planned yet; introduce() comes first")
        return self._ready

    @property
    def peak_bytes(self) -> int:
        """Peak memory of this process that is its own: resident at the peak, less pages that files back.

        Those are shared with other processes and given back under pressure, so no limit kills for them. Where the
        kernel does not tell them apart, all of it.
        """
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024 - _file_backed()

    def introduce(self, spec: AdapterSpec) -> Introduction:
        """Probe, plan, load the base and attach an adapter of zero product.

        Raises:
            PlanError: this device cannot bear the smallest plan.
            BaseModelError: no such base, or it cannot be converted.
            DataError: no example of ours fits the fleet's length.
        """
        settings = self._settings
        if self._ready is not None and self._ready.spec == spec:
            return self._introduction(self._ready)
        self.release()  # an earlier plan's model, if there is one, must not be in memory beside the new one
        profile = probe(memory_limit=settings.memory_limit)
        # The fleet's bases are 4-bit; a device that cannot compute with them learns so from its plan.
        prepared = prepare(settings.base, precision="nf4", cache=settings.cache, say=self._say)
        card = card_from_config(prepared.folder)
        chosen = plan(
            profile,
            card,
            target_modules=spec.target_modules,
            rank_choices=tuple(rank for rank in RANKS if rank <= spec.max_rank) or (spec.max_rank,),
            held_limit=spec.max_held,
            max_length=spec.max_length,
            batch_size=settings.batch_size,
            threads=settings.threads,
            precision="nf4",
        )
        self._say(f"{profile.cpu_model}: {profile.reasons['memory_bearable_bytes']}")
        self._ready = self._make_ready(spec, chosen, card, prepared)
        return self._introduction(self._ready, f"{profile.name}: {profile.cpu_model}, {profile.usable_cores} cores")

    def _make_ready(self, spec: AdapterSpec, chosen: Plan, card: ModelCard, prepared: PreparedBase) -> Ready:
        torch.set_num_threads(chosen.threads)
        slot = _slot(chosen, card, spec)
        base = load(prepared, compute_dtype="bf16" if chosen.compute_dtype == "bf16" else "fp32")
        train, held_out = data.split(self._settings.examples, fraction=self._settings.eval_fraction)
        tokens = data.tokenise_all(train, base.tokenizer, spec.max_length)
        tokens_held_out = data.tokenise_all(held_out[: self._settings.eval_examples], base.tokenizer, spec.max_length)
        if not tokens.examples or not tokens_held_out.examples:
            raise DataError(
                f"no example has a completion within {spec.max_length} tokens; give shorter examples, "
                "or raise adapter.max_length in the fleet's file"
            )
        if tokens.dropped:
            self._say(f"{tokens.dropped} examples are longer than {spec.max_length} tokens and are left out")
        live = get(spec.family).attach(base.model, slot, scaling=spec.scaling)
        return Ready(chosen, card, spec, slot, base, live, tokens.examples, tokens_held_out.examples)

    def _introduction(self, ready: Ready, device: str = "") -> Introduction:
        versions = {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")
        }
        return Introduction(
            slot=ready.slot,
            base=ready.base.prepared.fingerprint,
            examples=len(ready.train),
            device=device or platform.node(),
            precision=ready.plan.precision,
            plan=_in_words(ready.plan, ready.card),
            software=f"python {platform.python_version()}, " + ", ".join(f"{n} {v}" for n, v in versions.items()),
        )

    def receive(self, adapter: Adapter) -> None:
        """Put the global adapter, cut to what the slot holds, into the live model."""
        self._received = adapter
        get(self.ready.spec.family).load(self.ready.live, adapter)

    def evaluate(self) -> float:
        """Mean completion loss on the held-out examples, nats per token."""
        return loop.evaluate(self.ready.live, self.ready.held_out).loss

    def train(self, training: Training, round_number: int, on_step: Callable[[StepReport], None]) -> LocalResult:
        """One local round from what was received.

        Raises:
            RoundError: the loss is not finite, or gradients are missing.
            KeyboardInterrupt: asked to stop.
        """
        ready, before = self.ready, self._received
        if before is None:
            raise DataError("nothing was received yet; receive() comes first")
        task = loop.LocalTask(
            steps=training.max_steps,
            learning_rate=training.learning_rate,
            micro_batch=ready.plan.micro_batch,
            gradient_accumulation_steps=-(-training.batch_size // ready.plan.micro_batch),
            warmup_steps=training.warmup_steps,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            # Another order of the examples in each round, the same in each repetition of the run.
            seed=training.seed * 10_007 + round_number,
            gradient_checkpointing=ready.plan.gradient_checkpointing,
        )
        result = loop.train_round(
            ready.live,
            ready.train,
            task,
            on_step=lambda at: on_step(StepReport(at.step, at.steps, at.loss)),
            should_stop=self._should_stop,
        )
        if not result.finished:
            raise KeyboardInterrupt
        trained = get(ready.spec.family).read_trained(ready.live)
        moved = {name: change(pair, take(before[name], ready.live.directions[name])) for name, pair in trained.items()}
        return LocalResult(Adapter(moved), result.examples, result.loss_first, result.loss_last)

    def release(self) -> None:
        """Give the live model's memory back; the trainer is of no use afterwards."""
        self._ready = self._received = None
        gc.collect()

    def personal(self) -> Adapter:
        """All that the live model holds now, the trained slice included: this device's own adapter."""
        return get(self.ready.spec.family).read_all(self.ready.live)


def _file_backed() -> int:
    """Bytes of this process that files back now; 0 where the kernel does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = re.search(r"^RssFile:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _slot(chosen: Plan, card: ModelCard, spec: AdapterSpec) -> Slot:
    """The plan's slot within the fleet's terms: no rank beyond a layer's size, nothing held that must not be."""
    layers = {}
    for name, layer in chosen.layers(card, spec.target_modules).items():
        widest = min(layer.d_out, layer.d_in, spec.max_held)
        trained = min(layer.trained, widest)
        held = layer.held if spec.hold_more else (layer.trained or chosen.rank)
        layers[name] = LayerSlot(layer.d_out, layer.d_in, max(trained, min(held, widest)), trained)
    return Slot(layers)


def _in_words(chosen: Plan, card: ModelCard) -> str:
    layers = "all" if chosen.layers_trained == card.num_layers else f"last {chosen.layers_trained}"
    checkpointing = ", checkpointing" if chosen.gradient_checkpointing else ""
    return (
        f"rank {chosen.rank} of {chosen.held} held, {layers} of {card.num_layers} layers, {chosen.precision}, "
        f"{chosen.compute_dtype} compute, micro-batch {chosen.micro_batch}{checkpointing}, "
        f"≤ {chosen.predicted_peak_bytes / 2**20:.0f} MiB"
    )
