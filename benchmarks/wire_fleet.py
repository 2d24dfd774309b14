"""A fleet of unequal devices that really learns, small enough to be trained once for every codec.

MiniLM tells which task a text is the answer of; ten devices with ranks from 2 to 32 hold labels in unequal shares
(Dirichlet, 0.3). The head is fitted once, before the first round, on a small public sample, and then frozen: what the
devices learn is in their adapters alone, and all of it travels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from edge_runtime.lora.adapter import Adapter, LayerSlot, Slot
from edge_runtime.lora.algebra import change, changed, cut
from edge_runtime.lora.factors import Factors
from edge_runtime.train import classify, families, live
from edge_runtime.train.classify import Classifier, ClassifierTask, Labelled
from edge_runtime.train.data import Example, Message, load_examples, split
from edge_runtime.train.encoder import load_encoder
from edge_runtime.train.label_choice import labels_of
from edge_runtime.train.loop import learning
from edge_runtime.train.optimizer import gradient_norms
from edge_runtime.train.stdlib_docs import GROUPS
from edge_runtime.train.terms import Term
from edge_runtime.wire import codec
from server.aggregators.increment import increment
from server.aggregators.method import Update, fresh_state

RANKS = (2, 2, 4, 4, 4, 8, 8, 16, 16, 32)
GLOBAL_RANK = 32
LENGTH = 32
BATCH = 8
LEARNING_RATE = 2e-3
LEARNING_RATE_EVERY_LINEAR = 5e-4
"""With 36 adapted layers in the place of 12, the loss rises again at the other rate, from round 8 or so on."""
PUBLIC, HELD_OUT = 256, 768
ALPHA = 0.3
ROWS = 4000
"""Of a table, at most."""
T = TypeVar("T")
Exchange = Callable[[str, Adapter, Adapter], tuple[Adapter, int]]
"""(device, what it received of the slice it trained, its change) → (the change as the server decodes it, bytes)."""


@dataclass(frozen=True, eq=False)
class Fleet:
    """Everything that is the same for every codec.

    Attributes:
        classifier: the encoder without an adapter, and the frozen head.
        devices: name → rank and texts.
        held_out: texts of every label that no device has.
        shapes: (d_out, d_in) of each adapted layer.
        learning_rate: at the beginning of each round.
        taking_part: devices of a round, where not all are.
        batch: texts of an optimiser step of a device.
    """

    classifier: Classifier
    devices: dict[str, tuple[int, list[Labelled]]]
    held_out: list[Labelled]
    shapes: dict[str, tuple[int, int]]
    learning_rate: float = LEARNING_RATE
    taking_part: int = 5
    batch: int = BATCH


def examples_in(folder: Path) -> list[Example]:
    """Texts and what they are: answers and their task, or docstrings and what their module is for."""
    found: list[tuple[str, str]] = []
    table = folder / "train.tsv"
    if table.exists():
        rows = [line.rsplit("\t", 1) for line in table.read_text(encoding="utf-8").splitlines()[1:]]
        found += [(text.strip(), f"label {label}") for text, label in rows[:ROWS]]
    for path in sorted(folder.glob("*.train.jsonl")):
        answers = [example.messages[-1].content for example in load_examples(str(path))]
        if len(set(answers)) > len(answers) / 3:  # "yes" may answer any task
            found += [(answer, path.stem) for answer in dict.fromkeys(answers)]
    if not found:
        found = [(e.messages[-1].content, group) for group in GROUPS for e in load_examples(f"stdlib-docs:{group}")]
    return [Example((Message("user", text), Message("assistant", label))) for text, label in found if text.strip()]


def build(
    folder: Path,
    seed: int,
    ranks: Sequence[int] = RANKS,
    *,
    every_linear: bool = False,
    alpha: float = ALPHA,
    encoder: str = "minilm",
    device: str = "cpu",
) -> Fleet:
    """The fleet of that seed: who has which texts, and the head that all share.

    Adapted are the query and value layers, all of one size, or every linear layer of the encoder's blocks.

    Args:
        folder: of the texts; a file `train.tsv` in it has sentences and labels.
        seed: of texts, shares and head.
        ranks: of the devices.
        every_linear: which layers are adapted.
        alpha: of Dirichlet's distribution, of the shares that devices have of each label; infinite for equal shares,
            and 0 where each label is on one device.
        encoder: an alias, or a folder.
        device: where the model is, in torch's words.
    """
    examples = examples_in(folder)
    train, held_out = split(examples, seed=seed)
    loaded = load_encoder(encoder, device=device)
    modules = loaded.kind.all_linear if every_linear else loaded.kind.attention
    classifier = classify.build(
        loaded, labels_of(examples), rank=1, target_modules=modules, max_length=LENGTH, seed=seed
    )
    shapes = dict(classifier.live.slot.shapes)
    public, private = train[:PUBLIC], train[PUBLIC:]
    # The adapter of `build` is zero and its rate next to nothing: the head alone learns.
    classify.train_classifier(classifier, public, ClassifierTask(steps=60, learning_rate=1e-12, seed=seed))
    live.detach(classifier.live)
    texts = classify.encode(classifier, private)
    shares = dealt(texts, [text.label for text in texts], len(ranks), seed, alpha)
    devices = {f"device-{i}": (rank, shares[i]) for i, rank in enumerate(ranks)}
    rate = LEARNING_RATE_EVERY_LINEAR if every_linear else LEARNING_RATE
    return Fleet(classifier, devices, list(classify.encode(classifier, held_out[:HELD_OUT])), shapes, rate)


def dealt(texts: Sequence[T], kinds: Sequence[int], devices: int, seed: int, alpha: float) -> list[list[T]]:
    """Texts dealt to devices: of each kind, shares drawn from Dirichlet(alpha).

    Args:
        texts: one at least.
        kinds: of each text, from 0.
        devices: how many there are.
        seed: of the shares.
        alpha: infinite for equal shares, and 0 where each kind is on one device; one that gets none has the first text.
    """
    draw, count = np.random.default_rng(seed), max(kinds) + 1
    hands: list[list[T]] = [[] for _ in range(devices)]
    if alpha == 0:
        owners = draw.permutation(count)
        for text, kind in zip(texts, kinds, strict=True):
            hands[int(owners[kind]) % devices].append(text)
        return [hand or [texts[0]] for hand in hands]
    for kind in range(count):
        own = [text for text, of in zip(texts, kinds, strict=True) if of == kind]
        parts = np.full(devices, 1 / devices) if math.isinf(alpha) else draw.dirichlet([alpha] * devices)
        edges = np.rint(np.cumsum(parts) * len(own)).astype(int)
        for hand, start, stop in zip(hands, [0, *edges[:-1]], edges, strict=True):
            hand.extend(own[start:stop])
    return [hand or [texts[0]] for hand in hands]


@dataclass(frozen=True)
class Round:
    """What a round left: held-out loss of the new version in nats, its accuracy, bytes that went up."""

    loss: float
    accuracy: float
    bytes_up: int


def run(fleet: Fleet, exchange: Exchange, *, rounds: int, steps: int, seed: int, every: int = 0) -> Iterator[Round]:
    """The rounds of one fleet's life, each device's update through `exchange`.

    Args:
        fleet: from `build`; it is left as it was.
        exchange: brings an update to the server.
        rounds: how many.
        steps: optimiser steps of each device in each round.
        seed: of the first adapter, and of the order of the texts.
        every: evaluate each so many rounds; 0 for the last one only. Others say NaN.
    """
    method = increment()
    state = fresh_state(fleet.shapes, GLOBAL_RANK, seed)
    for number in range(1, rounds + 1):
        sent = codec.decode(codec.encode(state.adapter, "int8"))
        updates, size = [], 0
        for name, (rank, texts) in fleet.devices.items():
            received = Adapter({layer: cut(pair, rank) for layer, pair in sent.items()})
            rows = {layer: range(min(rank, pair.rank)) for layer, pair in sent.items()}
            with attached(fleet, sent, rows) as found:
                moved, _ = train(found, texts, steps, seed * 1000 + number, fleet.learning_rate)
            arrived, bytes_up = exchange(name, received, moved)
            size += bytes_up
            trained = Adapter({layer: changed(received[layer], pair) for layer, pair in arrived.items()})
            received = Adapter({layer: received[layer] for layer in trained})
            updates.append(Update(name, float(min(len(texts), steps * BATCH)), received, trained))
        state = method.combine(state, updates).state
        due = number == rounds or (every and number % every == 0)
        loss, accuracy = evaluate(fleet, state.adapter) if due else (math.nan, math.nan)
        yield Round(loss, accuracy, size)


@contextmanager
def attached(fleet: Fleet, adapter: Adapter, rows: Mapping[str, Sequence[int]]) -> Iterator[Classifier]:
    """The classifier with an adapter of which these rows are trained; the encoder is as before when it ends."""
    base = fleet.classifier
    slot = Slot(
        {
            name: LayerSlot(*pair.shape, held=pair.rank, trained=len(rows.get(name, ())))
            for name, pair in adapter.items()
        }
    )
    model = live.attach(base.live.model, slot, scaling=base.live.scaling)
    families.get(classify.FAMILY).load(model, adapter, rows)
    try:
        yield Classifier(model, base.head, base.labels, base.tokenizer, base.max_length)
    finally:
        live.detach(model)


def train(
    found: Classifier,
    texts: Sequence[Labelled],
    steps: int,
    seed: int,
    rate: float,
    terms: Sequence[Term] = (),
    factors: Factors = "ab",
) -> tuple[Adapter, list[float]]:
    """Factor-wise change of the trained rows after so many steps on these texts, and the norms of the loss's gradients.

    Args:
        found: from `attached`.
        texts: the device's.
        steps: optimiser steps.
        seed: of the order of the texts.
        rate: the learning rate at the first step; it falls to zero in a straight line.
        terms: beside the loss.
        factors: which of the slice are trained.
    """
    before = live.read_trained(found.live)
    whole = live.trainable_parameters(found.live)
    named = learning(whole, factors)
    for name, parameter in whole.items():
        parameter.requires_grad_(name in named)
    parameters, norms = list(named.values()), []
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    lengths = [len(text.input_ids) for text in texts]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        chosen = classify.batch_of(step, lengths, BATCH, seed)
        loss = classify.classification_loss(found, classify.collate(found, [texts[i] for i in chosen]))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        norms.append(math.hypot(*gradient_norms(named).values()))
        for term in terms:
            term(named)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    after = live.read_trained(found.live)
    return Adapter({name: change(after[name], before[name]) for name in after}), norms


def evaluate(fleet: Fleet, adapter: Adapter, texts: Sequence[Labelled] | None = None) -> tuple[float, float]:
    """Loss in nats and accuracy of an adapter on these texts, or on the held-out ones."""
    total, right = 0.0, 0
    with attached(fleet, adapter, {}) as found, torch.no_grad():
        ordered = sorted(fleet.held_out if texts is None else texts, key=lambda text: len(text.input_ids))
        for start in range(0, len(ordered), 64):
            batch = classify.collate(found, ordered[start : start + 64])
            scores = classify.logits(found, batch)
            total += float(torch.nn.functional.cross_entropy(scores, batch.labels, reduction="sum"))
            right += int((scores.argmax(dim=-1) == batch.labels).sum())
    return total / len(ordered), right / len(ordered)
