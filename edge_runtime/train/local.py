"""The real trainer: probe, plan, load the base as planned, train and evaluate on this device's own examples."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from edge_runtime.errors import DataError, DeviceMemoryError
from edge_runtime.lora.adapter import Adapter, Matrix, Slot
from edge_runtime.lora.algebra import change
from edge_runtime.lora.slices import Scores
from edge_runtime.train import cores, data, drift, evaluating, heap, loop, own_texts, prepared, resume
from edge_runtime.train.alignment import scores
from edge_runtime.train.base import LoadedBase, load, prepare
from edge_runtime.train.bounds import bound_primitive_cache
from edge_runtime.train.exhaustion import bearing
from edge_runtime.train.families import get
from edge_runtime.train.footprint import Footprint
from edge_runtime.train.keeping import Keeping, KeptRounds, RoundName, apart, key_of
from edge_runtime.train.live import LiveModel
from edge_runtime.train.near import terms_of
from edge_runtime.train.optimizer import LEAST_8BIT, Array
from edge_runtime.train.planning import Owner, choose, in_words, shared, slot_of
from edge_runtime.train.receiving import Received, fitted, receive, slot_for
from edge_runtime.train.regaining import regained_at
from edge_runtime.train.reporting import SILENT, Reporting, Reports, Subject
from edge_runtime.train.source import resolve
from edge_runtime.train.tasks import same_model, same_numbers, task_of
from edge_runtime.train.vocabulary import check_vocabulary
from edge_runtime.trainer import AdapterSpec, Gate, Introduction, LocalResult, StepReport, Texts, Training
from profiles.card import ModelCard
from profiles.device import DeviceProfile
from profiles.find_card import find_card
from profiles.plan import Plan
from profiles.probe import refresh
from profiles.remembered import remembered_probe
from profiles.speed import shapes

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
MIB = 2**20


@dataclass(frozen=True)
class LocalSettings:
    """What this device brings.

    Attributes:
        base: alias, hub id, folder or GGUF file.
        examples: its own examples.
        eval_fraction: share of them held out, always the same ones.
        eval_examples: held-out examples that are really evaluated, at most.
        owner: what its owner allows.
        cache: where converted bases are kept.
        keeping: where and how often the state of a round is kept; None for a device whose rounds begin anew after a
            restart.
        reporting: where the numbers of training go.
    """

    base: str
    examples: Sequence[data.Example]
    eval_fraction: float
    eval_examples: int
    owner: Owner
    cache: Path
    keeping: Keeping | None = None
    reporting: Reporting = SILENT


@dataclass(frozen=True, eq=False)
class Ready:
    """A trainer that has planned: the plan, the live model, and its examples as tokens."""

    plan: Plan
    card: ModelCard
    spec: AdapterSpec
    ceiling: int | None
    slot: Slot
    base: LoadedBase
    live: LiveModel
    train: Sequence[data.Tokenised]
    held_out: Sequence[data.Tokenised]
    choosing: Sequence[data.Tokenised]
    data: str
    """A digest of the examples to train on, in their order."""


class LocalTrainer:
    """Implements `edge_runtime.trainer.Trainer` with torch.

    Args:
        settings: what this device brings.
        say: told a sentence for people.
    """

    def __init__(self, settings: LocalSettings, *, say: Callable[[str], None]) -> None:
        bound_primitive_cache(os.environ)
        heap.steady()
        self._settings, self._say = settings, say
        self._profile: DeviceProfile | None = None
        self._ready: Ready | None = None
        self._received: Received | None = None
        self._kept = KeptRounds(settings.keeping, say)
        self._kept_own = KeptRounds(apart(settings.keeping), say)
        self._footprint = Footprint()
        self.reports = Reports(settings.reporting, say)

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
        return self._footprint.peak_bytes

    def introduce(
        self, spec: AdapterSpec, training: Training, ceiling: int | None, on_plan: Callable[[int], None]
    ) -> Introduction:
        """Probe, plan, load the base and attach an adapter of zero product.

        A plan that trains the same slice of the same base, and only passes fewer examples at once, recomputes more
        layers or has another optimiser, takes over the model that is loaded.

        Raises:
            PlanError: this device cannot bear the smallest plan.
            DeviceMemoryError: memory ran out while the base was loaded.
            BaseModelError: no such base, or it cannot be converted.
            DataError: no example of ours fits the fleet's length.
        """
        before = self._ready
        if before is not None and (before.spec, before.ceiling) == (spec, ceiling):
            return self._introduction(before)
        if before is not None and before.spec != spec:
            before = None
            self._forget()
            self.release()
        card = find_card(self._settings.base)
        profile = self._profile = self._probed(card)
        chosen = choose(profile, card, spec, training, self._owner(), ceiling)
        on_plan(chosen.predicted_peak_bytes)
        self._say(f"{profile.cpu_model}: {profile.reasons['memory_bearable_bytes']}")
        slot = slot_of(chosen, card, spec)
        if before is not None and same_model(before.plan, chosen) and before.slot == slot:
            self._ready = replace(before, plan=chosen, ceiling=ceiling)
            heap.release()
            self._footprint.begin()
        else:
            self._forget()
            del before  # two models at once are what no device has room for
            self.release()
            with bearing("loading the base model"):
                self._ready = self._load(spec, ceiling, chosen, card, slot, profile)
        return self._introduction(self._ready)

    def _forget(self) -> None:
        self._kept.forget()
        self._kept_own.forget()

    def _probed(self, card: ModelCard) -> DeviceProfile:
        limit, cache = self._settings.owner.memory_limit, self._settings.cache
        if self._profile is not None:
            return refresh(self._profile, memory_limit=limit)
        return remembered_probe(cache / "profiles", shapes=shapes(card), memory_limit=limit, say=self._say)

    def _owner(self) -> Owner:
        """What the owner insists on; a base that was prepared elsewhere has the precision that it has."""
        owner, path = self._settings.owner, resolve(self._settings.base).path
        if owner.overrides.precision is not None or not prepared.is_prepared(path):
            return owner
        precision = prepared.read_manifest(path).precision
        return replace(owner, overrides=replace(owner.overrides, precision=precision))

    def _load(
        self, spec: AdapterSpec, ceiling: int | None, chosen: Plan, card: ModelCard, slot: Slot, profile: DeviceProfile
    ) -> Ready:
        settings = self._settings
        found = prepare(
            settings.base, precision=chosen.precision, regained=regained_at(chosen.precision, spec.regained),
            cache=settings.cache, say=self._say,
            memory_bytes=None if profile.pool == "gpu" else profile.memory_bearable_bytes or None,
        )  # fmt: skip
        torch.set_num_threads(chosen.threads)
        self._footprint.begin()  # what conversion took is no part of the plan
        device = "cuda" if profile.kind == "cuda" else "cpu"
        base = load(found, compute_dtype=chosen.compute_dtype, product_dtype=chosen.product_dtype, device=device)
        rows = base.model.get_input_embeddings().weight.shape[0]
        check_vocabulary(base.tokenizer, rows, base.prepared.label)
        texts = own_texts.tokens_in(
            self._parts(), base.tokenizer, chosen.max_length, cache=settings.cache / "tokens", say=self._say, rows=rows
        )
        live = get(spec.family).attach(cores.inserted(base.model, slot), slot, scaling=spec.scaling)
        return Ready(chosen, card, spec, ceiling, slot, base, live, *texts, data.digest_of(texts.train))

    def _parts(self) -> own_texts.Parts:
        settings = self._settings
        return own_texts.parts_of(settings.examples, settings.eval_fraction, settings.eval_examples)

    def _introduction(self, ready: Ready) -> Introduction:
        versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
        profile = self._profile
        return Introduction(
            slot=shared(ready.slot, ready.spec),
            base=ready.base.prepared.fingerprint,
            examples=len(ready.train),
            device=f"{profile.name}: {profile.cpu_model}, {profile.usable_cores} cores" if profile else platform.node(),
            precision=ready.plan.precision,
            plan=in_words(ready.plan, ready.card, ready.spec),
            least=LEAST_8BIT if ready.plan.optimizer == "adamw_8bit" else 1,
            choosing=len(ready.choosing),
            software=f"python {platform.python_version()}, " + ", ".join(f"{n} {v}" for n, v in versions.items()),
        )

    def receive(self, adapter: Adapter, rows: Mapping[str, Sequence[int]] | None = None) -> None:
        """Put the global adapter, cut to what the slot holds, into the live model; its rows to train, if not the first.

        Raises:
            RoundError: it does not fit the slot.
        """
        ready, family = self.ready, get(self.ready.spec.family)
        with bearing("putting the global adapter into the model"):
            live = fitted(ready.live, family, slot_for(ready.slot, rows, adapter.ranks))
            self._ready = replace(ready, live=live)
            self._received = receive(live, family, adapter, rows)
        self.reports.received()

    def scores(self) -> dict[str, Scores]:
        """How much each direction of what was received matters to this device's examples, layer by layer."""
        ready = self.ready
        one = Training(
            max_steps=1, learning_rate=1.0, batch_size=ready.plan.micro_batch * ready.plan.gradient_accumulation_steps,
            warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, seed=0,
        )  # fmt: skip
        return scores(ready.live, ready.train, task_of(one, 0, ready.plan, ready.spec))

    def evaluate(self, texts: Texts = "reported") -> float:
        """Mean completion loss on held-out examples, nats per token; of those that choose, no tracker is told."""
        ready, reported = self.ready, texts == "reported"
        with bearing("evaluating"):
            loss = evaluating.evaluate(ready.live, ready.held_out if reported else ready.choosing).loss
        if reported:
            self.reports.evaluated(loss, self._subject)
        return loss

    def _subject(self) -> Subject:
        ready = self.ready
        return Subject(ready.live.model, ready.base.tokenizer, self._parts().reported, ready.plan)

    def train(
        self,
        training: Training,
        round_number: int,
        on_step: Callable[[StepReport], None],
        gate: Gate,
        personal: Adapter | None = None,
    ) -> LocalResult:
        """One local round from what was received, or the rest of one that was interrupted.

        By lack of memory, a stop, a kill (with a place on disk), or a step that gave no finite number.

        Raises:
            DeviceMemoryError: memory ran out, or the process grew beyond what this device can bear.
            RoundError: the loss is not finite (says which layer), gradients are missing, or the fleet asks for a
                schedule that this version does not know.
            KeyboardInterrupt: asked to stop.
        """
        ready, received = self.ready, self._received
        kept = self._kept if personal is None else self._kept_own
        if received is None:
            raise DataError("nothing was received yet; receive() comes first")
        task = task_of(training, round_number, ready.plan, ready.spec)

        def stepped(at: resume.StepReport) -> None:
            on_step(StepReport(at.step, at.steps, at.loss))
            self.reports.stepped(at, round_number)
            self._check_footprint(at.step)

        def asked() -> bool:
            self._footprint.sample()
            return gate()

        with bearing("training"):
            start = self._start(training, round_number, received, personal)
            try:
                result = loop.train_round(
                    ready.live,
                    ready.train,
                    task,
                    start=start,
                    on_step=stepped,
                    should_stop=asked,
                    keep=kept.stepped,
                    terms=terms_of(training, received, start, ready.live.scaling, personal),
                )
            except resume.NotFiniteError as error:
                if error.state is not None:
                    kept.interrupted(error.state)
                raise
        if not result.finished:
            kept.interrupted(result.state)
        if result.failure:
            raise DeviceMemoryError(result.failure)
        if not result.finished:
            raise KeyboardInterrupt
        family = get(ready.spec.family)
        if training.correction:
            known = drift.record(family.read_all(ready.live), received.before, received.rows)
            result = replace(result, state=replace(result.state, beside={**result.state.beside, **known}))
        kept.finished(result.state)
        trained = family.read_trained(ready.live)
        moved = {name: change(pair, received.before[name]) for name, pair in trained.items()}
        return LocalResult(Adapter(moved), result.examples, result.loss_first, result.loss_last)

    def _start(
        self, training: Training, round_number: int, received: Received, personal: Adapter | None
    ) -> resume.RoundState | None:
        """What the round begins with; None for the adapter that was received, and nothing more."""
        ready, base = self.ready, self.ready.base.prepared.fingerprint
        optimizer = ready.plan.optimizer  # moments of one kind mean nothing to the other
        of_model = (base, ready.base.prepared.regained, ready.spec.family, optimizer)
        own = () if personal is None else (personal.digest(),)
        of_round = (training, round_number, received.digest, ready.live.slot, received.rows, *own)
        key = key_of(*of_round, same_numbers(ready.plan), of_model, ready.data)
        family = get(ready.spec.family)

        def parameters() -> dict[str, Matrix]:
            learnt = loop.learning(family.trainable(ready.live), training.factors)
            return {name: p.detach().cpu().numpy().copy() for name, p in learnt.items()}

        name = RoundName(round_number, key, key_of(of_model), optimizer)

        def pushed(last: resume.RoundState, rounds: int) -> Mapping[str, Array]:
            held = family.read_all(ready.live)
            return drift.drift_of(last, rounds, held, ready.live.scaling, training.correction)

        beside = pushed if training.correction else None
        kept = self._kept if personal is None else self._kept_own
        start = kept.begin(name, parameters, carry=training.carry_moments, beside=beside)
        if start is not None and start.reports:
            self._say(f"going on after step {len(start.reports)} of {training.max_steps}")
        return start

    def _check_footprint(self, step: int) -> None:
        """Compare the peak since the plan was made with what the device can bear, before the kernel does.

        Raises:
            DeviceMemoryError: the peak is above it.
        """
        profile = self._profile
        if profile is None or "memory_bearable_bytes" in profile.unreadable:
            return
        self._footprint.sample()
        peak, bearable = self._footprint.since_begin(profile.pool), profile.memory_bearable_bytes
        if peak > bearable:
            raise DeviceMemoryError(
                f"after step {step} the peak is {peak / MIB:.0f} MiB, and this device can bear {bearable / MIB:.0f} MiB"
            )

    def release(self) -> None:
        """Give the live model's memory back; another `introduce` must come before any other work."""
        self._ready = self._received = None
        gc.collect()
        heap.release()
        torch.cuda.empty_cache()  # does nothing where CUDA was never used

    def personal(self) -> Adapter:
        """All that the live model holds now, the trained slice included: this device's own adapter."""
        return cores.expanded(get(self.ready.spec.family).read_all(self.ready.live), self.ready.live.model)
