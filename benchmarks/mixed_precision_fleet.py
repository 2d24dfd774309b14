"""A fleet of unequal devices over bases of unequal precision; devices, texts and head are those of `wire_fleet`.

A base is the encoder with every linear layer as that precision opens it, in float32, so that what is compared is what
the weights lost and not how fast or how exactly something multiplies. Of the ten devices half take part in a round, the
same ones in every fleet; all hold the whole global adapter, as they decoded it from int8.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from benchmarks import wire_fleet
from benchmarks.wire_fleet import BATCH, LENGTH, Fleet
from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.algebra import changed, cut
from edge_runtime.train import classify, eight_bit
from edge_runtime.train.classify import Classifier, Labelled
from edge_runtime.train.data import load_examples
from edge_runtime.train.lost import leading
from edge_runtime.train.stdlib_docs import GROUPS
from edge_runtime.wire import codec
from profiles.light_import import light_import
from profiles.memory import REGAINABLE
from server.aggregators.increment import increment
from server.aggregators.method import Update, fresh_state

GLOBAL_RANK = 2 * max(wire_fleet.RANKS)
TAKING_PART = 5
MIXED = ("nf4",) * 5 + ("int8",) * 2 + ("bf16",) * 3
"""Of the devices of `wire_fleet.RANKS`: whoever bears a small rank bears a narrow base."""
SHARE = 8
"""Of texts each so many is looked at where only a layer's inputs are asked for."""


def _bf16(weight: torch.Tensor) -> torch.Tensor:
    return weight.to(torch.bfloat16).float()


def _int8(weight: torch.Tensor) -> torch.Tensor:
    integers, scale = eight_bit.quantise(weight)
    return integers.float() * scale.float()[:, None]


def _nf4(weight: torch.Tensor) -> torch.Tensor:
    functional = light_import("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    opened: torch.Tensor = functional.dequantize_4bit(packed, state).float()
    return opened


OPENED: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {"bf16": _bf16, "int8": _int8, "nf4": _nf4}
"""Precision → the weight that a layer computes with, float32, as `edge_runtime.train.convert` keeps it."""


@dataclass(frozen=True)
class Way:
    """One fleet.

    Attributes:
        name: for the table.
        precisions: of each device.
        regained: directions of what a layer lost that a device holds beside it, frozen, and never sends.
        by: what those directions are the leading ones of.
    """

    name: str
    precisions: tuple[str, ...]
    regained: int = 0
    by: Literal["weights", "outputs"] = "outputs"


@dataclass(frozen=True, eq=False)
class Bases:
    """The bases of one fleet, as devices compute with them.

    Attributes:
        seen: precision → the fleet over the base of that precision.
        lost: precision → layer → W - Q(W), (d_out, d_in) float32, before anything is regained.
        left: the same after it.
    """

    seen: Mapping[str, Fleet]
    lost: Mapping[str, Mapping[str, torch.Tensor]]
    left: Mapping[str, Mapping[str, torch.Tensor]]


def bases(fleet: Fleet, way: Way) -> Bases:
    """A base for each precision, with what a way regains in each adapted layer, where a device would."""
    seen: dict[str, Fleet] = {}
    lost: dict[str, dict[str, torch.Tensor]] = {}
    left: dict[str, dict[str, torch.Tensor]] = {}
    sizes = inputs(fleet, _public(fleet)) if way.regained and way.by == "outputs" else {}
    for precision, opened in OPENED.items():
        model = copy.deepcopy(fleet.classifier.live.model)
        lost[precision], left[precision] = {}, {}
        for name in fleet.shapes:
            layer = model.get_submodule(name)
            whole = layer.weight.detach().clone()
            kept = opened(whole)
            error = whole - kept
            if way.regained and precision in REGAINABLE:
                a, b = leading(error, way.regained, sizes[name].diagonal().sqrt() if sizes else None)
                kept += b @ a
            layer.weight.data.copy_(kept)
            lost[precision][name], left[precision][name] = error, whole - kept
        seen[precision] = replace(fleet, classifier=_over(fleet.classifier, model))
    return Bases(seen, lost, left)


def _over(classifier: Classifier, model: torch.nn.Module) -> Classifier:
    return replace(classifier, live=replace(classifier.live, model=model))


def live(own: Bases, way: Way, *, rounds: int, steps: int, seed: int) -> Adapter:
    """The global adapter after so many rounds.

    Args:
        own: the bases of its devices.
        way: which device has which of them.
        rounds: how many.
        steps: optimiser steps of a device in a round.
        seed: of the first adapter, of the order of the texts, and of who takes part.
    """
    fleet = own.seen["bf16"]
    precisions = dict(zip(fleet.devices, way.precisions, strict=True))
    method, draw = increment(), np.random.default_rng(seed)
    state = fresh_state(fleet.shapes, GLOBAL_RANK, seed)
    for number in range(1, rounds + 1):
        sent = codec.decode(codec.encode(state.adapter, "int8"))
        asked = sorted(draw.choice(list(fleet.devices), TAKING_PART, replace=False))
        updates = [_update(own.seen[precisions[name]], name, sent, steps, seed * 1000 + number) for name in asked]
        state = method.combine(state, updates).state
    return state.adapter


def _update(fleet: Fleet, name: str, sent: Adapter, steps: int, order: int) -> Update:
    rank, texts = fleet.devices[name]
    received = Adapter({layer: cut(pair, rank) for layer, pair in sent.items()})
    with wire_fleet.attached(fleet, sent, {layer: range(pair.rank) for layer, pair in received.items()}) as found:
        moved, _ = wire_fleet.train(found, texts, steps, order, fleet.learning_rate)
    trained = Adapter({layer: changed(received[layer], pair) for layer, pair in moved.items()})
    return Update(name, float(min(len(texts), steps * BATCH)), received, trained)


def _public(fleet: Fleet) -> list[tuple[int, ...]]:
    """Token ids of texts that every machine has: as `edge_runtime.train.regaining` takes them."""
    texts = [e.messages[-1].content for group in GROUPS for e in load_examples(f"stdlib-docs:{group}")][::SHARE]
    classifier = fleet.classifier
    return [tuple(row) for row in classifier.tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]]


def inputs(fleet: Fleet, texts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Layer → (d_in, d_in), the mean of x xᵀ over what enters it: how much an error of the weight matters.

    Args:
        fleet: from `wire_fleet.build`.
        texts: token ids.
    """
    found = {name: torch.zeros(d_in, d_in) for name, (_, d_in) in fleet.shapes.items()}
    model, seen = fleet.classifier.live.model, 0

    def watching(name: str) -> Callable[..., None]:
        def watch(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            rows = given[0].detach().reshape(-1, given[0].shape[-1])
            found[name].addmm_(rows.T, rows)

        return watch

    hooks = [model.get_submodule(name).register_forward_pre_hook(watching(name)) for name in found]
    try:
        with torch.no_grad():
            # One text at a time: no padding is counted.
            for text in texts:
                classify.logits(fleet.classifier, classify.collate(fleet.classifier, [Labelled(tuple(text), 0)]))
                seen += len(text)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / seen for name, total in found.items()}


@dataclass(frozen=True)
class Learnt:
    """How much of an error an adapter has learnt, over all layers: ⟨B A, E⟩ / ⟨E, E⟩; 1 is all of it, 0 nothing.

    Attributes:
        of_weights: in the inner product of weights.
        of_outputs: in that of outputs: ⟨B A C, E⟩ / ⟨E C, E⟩, with C the mean of x xᵀ over a layer's inputs.
    """

    of_weights: float
    of_outputs: float


def learnt(adapter: Adapter, error: Mapping[str, torch.Tensor], seen: Mapping[str, torch.Tensor]) -> Learnt:
    """How much of an error an adapter has learnt.

    Args:
        adapter: the global one.
        error: layer → (d_out, d_in).
        seen: from `inputs`.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for name, pair in adapter.items():
        lost, product = error[name], torch.from_numpy(pair.product())
        weighed = lost @ seen[name]
        parts = ((product * lost).sum(), lost.square().sum(), (product * weighed).sum(), (weighed * lost).sum())
        sums += torch.stack(parts).double()
    along, whole, along_outputs, whole_outputs = sums.tolist()
    return Learnt(along / whole, along_outputs / whole_outputs)


def energy_left(own: Bases, precision: str, seen: Mapping[str, torch.Tensor] | None = None) -> float:
    """Share of what a base lost, in squares, that is still lost; of its weights, or of its outputs on these inputs."""

    def size(error: Mapping[str, torch.Tensor]) -> float:
        return sum(float((e.square() if seen is None else (e @ seen[name]) * e).sum()) for name, e in error.items())

    return size(own.left[precision]) / size(own.lost[precision])


def losses(own: Bases, adapter: Adapter, texts: Sequence[Labelled] | None = None) -> dict[str, float]:
    """Precision → held-out loss of an adapter over that base, in nats."""
    return {precision: wire_fleet.evaluate(seen, adapter, texts)[0] for precision, seen in own.seen.items()}
