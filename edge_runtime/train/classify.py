"""Sequence classification with an encoder: an adapter in its layers, the mean of its states, and a linear head.

Examples are those of `data`: a conversation whose last turn is the label, so the same rows train a causal model and an
encoder. The encoder stays frozen at its precision; adapter and head are float32, and the head is trained whole. The
same encoder, examples and task give the same bytes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from edge_runtime.errors import DataError, RoundError, missing_extra
from edge_runtime.train import families, heap
from edge_runtime.train.data import Example, batch_at
from edge_runtime.train.encoder import Encoder
from edge_runtime.train.fresh import fresh_adapter, slot_for
from edge_runtime.train.generate import answering, batches_by_length
from edge_runtime.train.label_choice import labels_of
from edge_runtime.train.live import LiveModel
from edge_runtime.train.loss import unwrap

try:
    import torch
    from torch.nn import functional
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "torch", "client") from missing

FAMILY = "lora"
"""The family of a classifier's adapter."""

POOL = 16
"""Batches that are drawn at once, to be cut into batches of similar length."""


@dataclass(frozen=True, eq=False)
class Classifier:
    """An encoder with an adapter and a head. Its weights change in place.

    Attributes:
        live: the encoder with its adapter.
        head: (labels, d_hidden), float32.
        labels: the label of each row of the head.
        tokenizer: of the encoder.
        max_length: tokens of a text, special ones included; longer texts lose their end.
    """

    live: LiveModel
    head: torch.nn.Linear
    labels: tuple[str, ...]
    tokenizer: Any
    max_length: int


@dataclass(frozen=True)
class Labelled:
    """One text as the encoder sees it.

    Attributes:
        input_ids: (t,) token ids, special ones included.
        label: row of the head; of no meaning where only the text is looked at.
    """

    input_ids: tuple[int, ...]
    label: int


@dataclass(frozen=True, eq=False)
class EncoderBatch:
    """Texts side by side, padded on the right to the longest.

    Attributes:
        input_ids: (texts, length), int64.
        mask: (texts, length), int64; 1 where a token is real.
        labels: (texts,), int64.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class ClassifierTask:
    """How a classifier is trained.

    Attributes:
        steps: optimiser steps.
        learning_rate: of the adapter, in the first step; it falls linearly to zero.
        head_learning_rate: of the head, which starts from nothing and may move faster.
        batch_size: texts of a step.
        weight_decay: of AdamW.
        max_grad_norm: the gradient's norm is clipped to this.
        seed: decides the order of the examples and the encoder's dropout.
    """

    steps: int
    learning_rate: float = 1e-3
    head_learning_rate: float = 1e-2
    batch_size: int = 16
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate", "head_learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"a classifier's task needs a positive {name}; found {getattr(self, name)}")


@dataclass(frozen=True)
class ClassifierStep:
    """One optimiser step: its number from 1, and the mean loss of its texts before it, in nats."""

    step: int
    loss: float


def build(
    encoder: Encoder,
    labels: Sequence[str],
    *,
    rank: int = 8,
    target_modules: Sequence[str] | None = None,
    scaling: float = 2.0,
    max_length: int = 128,
    seed: int = 0,
) -> Classifier:
    """A classifier that knows nothing yet: an adapter of zero product, a head of small random numbers.

    Args:
        encoder: from `encoder.load_encoder`; it is changed in place.
        labels: the label set, such as `label_choice.labels_of(examples)`.
        rank: directions of each adapted layer.
        target_modules: layers to adapt; the encoder's query and value layers when absent.
        scaling: PEFT's lora_alpha / r.
        max_length: tokens of a text; at most the positions that the encoder has.
        seed: of the adapter's and the head's first numbers.

    Raises:
        DataError: fewer than two labels, or one that appears twice.
        BaseModelError: target modules that the encoder lacks.
    """
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise DataError(f"expected at least 2 labels that differ, found {', '.join(labels) or 'none'}; give more rows")
    slot = slot_for(encoder.model, target_modules or encoder.kind.attention, rank)
    live = families.get(FAMILY).attach(encoder.model, slot, scaling=scaling)
    families.get(FAMILY).load(live, fresh_adapter(slot, seed))
    device = encoder.model.get_input_embeddings().weight.device
    head = torch.nn.Linear(encoder.model.config.hidden_size, len(labels), device=device)
    with torch.no_grad():
        draw = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed))
        head.weight.copy_(draw * encoder.model.config.initializer_range)
        head.bias.zero_()
    return Classifier(live, head, tuple(labels), encoder.tokenizer, min(max_length, encoder.longest))


def encode(classifier: Classifier, examples: Sequence[Example]) -> tuple[Labelled, ...]:
    """Texts as token ids, with the row of their label: all turns but the last are the text, the last is the label.

    Raises:
        DataError: no example, one without text or turns, or a label that the classifier does not have; lists its own.
    """
    if not examples:
        raise DataError("expected at least one labelled text, found none; give rows with a text and a label")
    found = labels_of(examples)
    rows = {label: row for row, label in enumerate(classifier.labels)}
    if unknown := sorted(set(found) - rows.keys()):
        raise DataError(f"expected labels among {', '.join(classifier.labels)}; found '{unknown[0]}'")
    texts = ["\n".join(turn.content for turn in example.messages[:-1]).strip() for example in examples]
    if "" in texts:
        raise DataError(f"expected a text before each label; example {texts.index('') + 1} has none")
    labels = [rows[example.messages[-1].content] for example in examples]
    return tuple(map(Labelled, _tokens(classifier, texts), labels))


def _tokens(classifier: Classifier, texts: Sequence[str]) -> list[tuple[int, ...]]:
    found = classifier.tokenizer(list(texts), truncation=True, max_length=classifier.max_length)["input_ids"]
    return [tuple(row) for row in found]


def collate(classifier: Classifier, texts: Sequence[Labelled]) -> EncoderBatch:
    """Texts as a batch, as long as the longest of them."""
    length = max(len(text.input_ids) for text in texts)
    # The padding token itself, for RoBERTa takes positions from it.
    input_ids = torch.full((len(texts), length), int(classifier.tokenizer.pad_token_id), dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, text in enumerate(texts):
        input_ids[row, : len(text.input_ids)] = torch.tensor(text.input_ids, dtype=torch.int64)
        mask[row, : len(text.input_ids)] = 1
    labels = torch.tensor([text.label for text in texts], dtype=torch.int64)
    device = classifier.head.weight.device
    return EncoderBatch(input_ids.to(device), mask.to(device), labels.to(device))


def logits(classifier: Classifier, batch: EncoderBatch) -> torch.Tensor:
    """(texts, labels), float32: the head over the mean of each text's states, padding left out."""
    states = unwrap(classifier.live.model)(input_ids=batch.input_ids, attention_mask=batch.mask).last_hidden_state
    weight = batch.mask[:, :, None].to(torch.float32)
    mean = (states.to(torch.float32) * weight).sum(dim=1) / weight.sum(dim=1)
    found: torch.Tensor = classifier.head(mean)
    return found


def classification_loss(classifier: Classifier, batch: EncoderBatch) -> torch.Tensor:
    """Mean cross-entropy over the texts of a batch: a float32 scalar in nats, differentiable."""
    return functional.cross_entropy(logits(classifier, batch), batch.labels)


def trainable(classifier: Classifier) -> dict[str, torch.nn.Parameter]:
    """The parameters that training changes, float32, by name: the adapter's, then `head.weight` and `head.bias`."""
    head = {f"head.{name}": parameter for name, parameter in classifier.head.named_parameters()}
    return {**families.get(FAMILY).trainable(classifier.live), **head}


def batch_of(step: int, lengths: Sequence[int], batch_size: int, seed: int) -> tuple[int, ...]:
    """The indices of the texts of one step: a pure function of its number, counted from 0.

    Some batches' worth of texts are drawn at random, sorted by length and cut into batches, which then follow each
    other in random order: hardly any padding, and no text is drawn twice before all were drawn once.
    """
    batches = max(1, min(POOL, len(lengths) // batch_size))
    pool = step // batches
    drawn = batch_at(pool, count=len(lengths), micro_batch=batches * batch_size, seed=seed)
    by_length = sorted(drawn, key=lambda index: (lengths[index], index))
    order = list(range(batches))
    random.Random(f"{seed}:{pool}").shuffle(order)  # noqa: S311 - an order that can be repeated is what is wanted
    first = order[step % batches] * batch_size
    return tuple(by_length[first : first + batch_size])


def train_classifier(
    classifier: Classifier,
    examples: Sequence[Example],
    task: ClassifierTask,
    *,
    on_step: Callable[[ClassifierStep], None] | None = None,
) -> list[ClassifierStep]:
    """Train adapter and head, in place; the mode of the encoder is left as it was found.

    Args:
        classifier: from `build`; it may have been trained before.
        examples: the last turn of each is its label.
        task: how.
        on_step: told of each step.

    Raises:
        DataError: no example, or one that does not fit the classifier.
        RoundError: a loss or gradient that is not finite; that step is not taken.
    """
    texts = encode(classifier, examples)
    lengths = [len(text.input_ids) for text in texts]
    optimizer = _optimizer(classifier, task)
    reports: list[ClassifierStep] = []
    with _learning(classifier):
        for step in range(task.steps):
            for group in optimizer.param_groups:
                group["lr"] = group["largest"] * (1 - step / task.steps)
            torch.manual_seed(task.seed * 1_000_003 + step)  # of the step: dropout does not depend on the past
            batch = collate(classifier, [texts[i] for i in batch_of(step, lengths, task.batch_size, task.seed)])
            reports.append(ClassifierStep(step + 1, _step(classifier, batch, optimizer, task, step)))
            if on_step is not None:
                on_step(reports[-1])
    optimizer.zero_grad(set_to_none=True)
    return reports


def _optimizer(classifier: Classifier, task: ClassifierTask) -> torch.optim.Optimizer:
    head = list(classifier.head.parameters())
    adapter = list(families.get(FAMILY).trainable(classifier.live).values())
    groups = [
        {"params": adapter, "largest": task.learning_rate},
        {"params": head, "largest": task.head_learning_rate},
    ]
    return torch.optim.AdamW(groups, weight_decay=task.weight_decay)


@contextmanager
def _learning(classifier: Classifier) -> Iterator[None]:
    """Training mode and a random state of its own; both as before when the context ends."""
    encoder, device = unwrap(classifier.live.model), classifier.head.weight.device
    was_training = encoder.training
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        encoder.train()
        try:
            yield
        finally:
            encoder.train(was_training)


def _step(
    classifier: Classifier, batch: EncoderBatch, optimizer: torch.optim.Optimizer, task: ClassifierTask, step: int
) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss = classification_loss(classifier, batch)
    torch.autograd.backward(loss)
    parameters = trainable(classifier)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), task.max_grad_norm))
    value = float(loss.detach())
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise RoundError(
            f"step {step + 1}: expected a finite loss and gradient, found {value} and norm {norm}; lower learning_rate"
        )
    lost = [name for name, parameter in parameters.items() if parameter.grad is None]
    if lost:
        raise RoundError(f"step {step + 1}: no gradient for {lost[0]}; the encoder's kernels cut the backward pass")
    optimizer.step()
    heap.release()
    return value


def classify(classifier: Classifier, texts: Sequence[str], *, batch_size: int = 32) -> list[str]:
    """The likeliest label of each text, in the order of the texts; `batch_size` changes memory, not the labels."""
    tokens = [Labelled(ids, 0) for ids in _tokens(classifier, texts)] if texts else []
    return [classifier.labels[row] for row in _rows(classifier, tokens, batch_size)]


def accuracy(classifier: Classifier, examples: Sequence[Example], *, batch_size: int = 32) -> float:
    """Share of the examples whose label the classifier finds.

    Raises:
        DataError: no example, or one that does not fit the classifier.
    """
    texts = encode(classifier, examples)
    rows = _rows(classifier, texts, batch_size)
    return sum(row == text.label for row, text in zip(rows, texts, strict=True)) / len(texts)


def _rows(classifier: Classifier, texts: Sequence[Labelled], batch_size: int) -> list[int]:
    found = [0] * len(texts)
    with answering(classifier.live.model):
        for batch in batches_by_length([text.input_ids for text in texts], batch_size):
            best = logits(classifier, collate(classifier, [texts[index] for index in batch])).argmax(dim=-1)
            for index, row in zip(batch, best.tolist(), strict=True):
                found[index] = row
            heap.release()
    return found
