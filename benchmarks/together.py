"""Trains and judges the adapters of many devices in one pass through the frozen model that all of them share.

A small model on a GPU waits for the next kernel most of the time. So the texts of many devices go through it side by
side, and in each adapted layer those of each device meet its own factors, in one batched product:

    y_g = x_g Wᵀ + s (x_g A_gᵀ) B_gᵀ        g counts devices

Nothing of one device enters another one's loss, so each trains as it would alone, up to rounding: the same texts in
the same order, the same clipping, the same AdamW. What a text is and what is lost on it is a `Subject`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch

from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.factors import Factors
from edge_runtime.lora.pruning import stays
from edge_runtime.train.classify import Labelled
from edge_runtime.train.cores import CORE, CoreLinear
from edge_runtime.train.data import Tokenised

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of AdamW, as torch has them."""
LARGEST_NORM = 1.0
Text = Labelled | Tokenised
Texts = Sequence[Text]
Chosen = Sequence[tuple[Texts, Sequence[int]]]
"""Of each device: its texts, and which of them are in its batch."""


class Subject(Protocol):
    """The frozen model that devices share, and how it looks at texts.

    Attributes:
        model: in whose adapted layers factors are met.
        shapes: (d_out, d_in) of each adapted layer.
        scaling: PEFT's lora_alpha / r.
        device: where it is.
    """

    model: Any
    shapes: Mapping[str, tuple[int, int]]
    scaling: float
    device: torch.device

    def batch_of(self, step: int, lengths: Sequence[int], order: int) -> tuple[int, ...]:
        """Which of a device's texts are in a step, counted from 0: a pure function, of the tokens of each text."""
        ...

    def losses(self, chosen: Chosen) -> torch.Tensor:
        """(devices,): the mean loss of each one's batch, in nats, differentiable; devices one after the other."""
        ...

    def judged(self, texts: Texts) -> tuple[float, float]:
        """Loss in nats and accuracy on texts, by the factors that are met at the moment."""
        ...


@dataclass(frozen=True, eq=False)
class Training:
    """What one device is to do in a round.

    Attributes:
        seen: what its model holds.
        rows: layer → which rows of that are trained.
        texts: its own.
        steps: optimiser steps.
        order: seed of the order of its texts.
        rate: at the first step; it falls to zero in a straight line.
        factors: which of the slice are trained.
        kept, penalty: of HetLoRA's penalty on the last directions of a slice; see `train.terms.tail`.
    """

    seen: Adapter
    rows: Mapping[str, Sequence[int]]
    texts: Texts
    steps: int
    order: int
    rate: float
    factors: Factors = "ab"
    kept: float = 1.0
    penalty: float = 0.0

    @property
    def pass_with(self) -> tuple[int, tuple[str, ...]]:
        """Only devices with the same steps and layers go through the model side by side."""
        return self.steps, tuple(self.seen)


@dataclass(frozen=True, eq=False)
class Judging:
    """An adapter, and the texts that it is to be judged by."""

    adapter: Adapter
    texts: Texts


class Site(torch.nn.Module):
    """A frozen linear layer at which the texts of each device meet its own factors.

    Attributes:
        factors: a (devices, r, d_in) and b (devices, d_out, r), scale not folded; None for the base alone.
        frame: frozen bases (r, d_in) and (d_out, r) around factors of a core; None where there is none.
    """

    def __init__(self, base: Any, scaling: float) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling
        self.factors: tuple[torch.Tensor, torch.Tensor] | None = None
        self.frame: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(devices · texts, length, d_in) → (devices · texts, length, d_out)."""
        y: torch.Tensor = self.base(x)
        if self.factors is None:
            return y
        a, b = self.factors
        rows = x.reshape(a.shape[0], -1, x.shape[-1])
        if self.frame is not None:
            rows = rows @ self.frame[0].mT
        found = torch.bmm(torch.bmm(rows, a.mT), b.mT)
        if self.frame is not None:
            found = found @ self.frame[1].mT
        return y + self.scaling * found.reshape(y.shape)


class Together:
    """The model of a fleet, shared by devices that learn side by side.

    Args:
        subject: its model is taken over, and of no use to others afterwards.
        devices: side by side, at most.
    """

    def __init__(self, subject: Subject, devices: int = 64) -> None:
        self._subject, self._device, self._devices = subject, subject.device, devices
        self._scaling = subject.scaling
        self._drawn = lru_cache(maxsize=8192)(subject.batch_of)  # many lives ask for the same texts
        self._sites: dict[str, Site] = {}
        for name in subject.shapes:
            parent, _, leaf = name.rpartition(".")
            self._sites[name] = Site(subject.model.get_submodule(name), self._scaling)
            setattr(subject.model.get_submodule(parent), leaf, self._sites[name])

    def train(self, wanted: Sequence[Training]) -> list[Adapter]:
        """Factor-wise change of the trained rows of each device, in the order asked."""
        found: dict[int, Adapter] = {}
        alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for at, one in enumerate(wanted):
            alike.setdefault(one.pass_with, []).append(at)
        for places in alike.values():
            # Ranks side by side are padded to the largest of them.
            places.sort(key=lambda at: max(pair.rank for pair in wanted[at].seen.values()))
            for first in range(0, len(places), self._devices):
                some = places[first : first + self._devices]
                found |= dict(zip(some, self._trained([wanted[at] for at in some]), strict=True))
        return [found[at] for at in range(len(wanted))]

    def judge(self, wanted: Judging) -> tuple[float, float]:
        """Loss in nats and accuracy of an adapter on texts."""
        with torch.no_grad(), self._meeting(_stacked([wanted.adapter], self._scaling, self._device), wanted.adapter):
            return self._subject.judged(wanted.texts)

    def _trained(self, wanted: Sequence[Training]) -> list[Adapter]:
        names = tuple(wanted[0].seen)
        before = _stacked([one.seen for one in wanted], self._scaling, self._device)
        parameters = [tensor.clone().requires_grad_() for tensor in before.tensors]
        masks = _masks(wanted, before, self._device)
        tails = _tails(wanted, before, self._device)
        moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
        rates = torch.tensor([one.rate for one in wanted], device=self._device)[:, None, None]
        steps, lengths = wanted[0].steps, [tuple(len(text.input_ids) for text in one.texts) for one in wanted]
        with self._meeting(Stack(tuple(parameters)), wanted[0].seen):
            for step in range(steps):
                chosen = [
                    (one.texts, self._drawn(step, mine, one.order)) for one, mine in zip(wanted, lengths, strict=True)
                ]
                loss = self._subject.losses(chosen).sum()
                gradients = [g * mask for g, mask in zip(torch.autograd.grad(loss, parameters), masks, strict=True)]
                with torch.no_grad():
                    _penalise(gradients, parameters, tails, self._scaling)
                    _clip(gradients)
                    _step(parameters, gradients, moments, rates * (1 - step / steps), step)
        return _changes(wanted, names, before, [p.detach() for p in parameters], self._scaling)

    def _meeting(self, stack: Stack, of: Adapter) -> _Meeting:
        return _Meeting(self._sites, stack, tuple(of), self._device)


@dataclass(frozen=True, eq=False)
class Stack:
    """`a` (devices, r, d_in) and `b` (devices, d_out, r) of each layer, one after the other; scale not folded."""

    tensors: tuple[torch.Tensor, ...]


class _Meeting:
    """While it lasts, the sites have these factors."""

    def __init__(self, sites: Mapping[str, Site], stack: Stack, names: Sequence[str], device: torch.device) -> None:
        self._sites, self._names, self._device = sites, names, device
        self._pairs = list(zip(stack.tensors[::2], stack.tensors[1::2], strict=True))

    def __enter__(self) -> None:
        for name, factors in zip(self._names, self._pairs, strict=True):
            site = self._sites[name.removesuffix(f".{CORE}")]
            site.factors = factors
            if name.endswith(f".{CORE}"):
                site.frame = self._frame(site, name.removesuffix(f".{CORE}"), factors[1].shape[1])

    def __exit__(self, *_problem: object) -> None:
        for site in self._sites.values():
            site.factors = site.frame = None

    def _frame(self, site: Site, path: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = CoreLinear(site.base, path, size)
        return drawn.a.detach().to(self._device), drawn.b.detach().to(self._device)


def _stacked(adapters: Sequence[Adapter], scaling: float, device: torch.device) -> Stack:
    tensors = []
    for name in adapters[0]:
        pairs = [adapter[name] for adapter in adapters]
        rank = max(pair.rank for pair in pairs)
        (d_out, d_in) = pairs[0].shape
        a, b = np.zeros((len(pairs), rank, d_in), np.float32), np.zeros((len(pairs), d_out, rank), np.float32)
        for at, pair in enumerate(pairs):
            a[at, : pair.rank], b[at, :, : pair.rank] = pair.a, pair.b / np.float32(scaling)
        tensors += [torch.from_numpy(a).to(device), torch.from_numpy(b).to(device)]
    return Stack(tuple(tensors))


def _masks(wanted: Sequence[Training], stack: Stack, device: torch.device) -> list[torch.Tensor]:
    """1 where a number is trained: (devices, r, 1) of each `a` and (devices, 1, r) of each `b`."""
    found = []
    for name, a in zip(wanted[0].seen, stack.tensors[::2], strict=True):
        for factor in ("a", "b"):
            mask = np.zeros(a.shape[:2], np.float32)
            for at, one in enumerate(wanted):
                if factor in one.factors:
                    mask[at, list(one.rows.get(name, ()))] = 1
            found.append(torch.from_numpy(mask[:, :, None] if factor == "a" else mask[:, None, :]).to(device))
    return found


Tail = tuple[torch.Tensor, torch.Tensor]
"""(devices, r): 1 for directions that are penalised; (devices,): how much."""


def _tails(wanted: Sequence[Training], stack: Stack, device: torch.device) -> list[Tail] | None:
    if not any(one.penalty for one in wanted):
        return None
    strengths = torch.tensor([one.penalty for one in wanted], dtype=torch.float32, device=device)
    found = []
    for name, a in zip(wanted[0].seen, stack.tensors[::2], strict=True):
        mask = np.zeros(a.shape[:2], np.float32)
        for at, one in enumerate(wanted):
            rows = list(one.rows.get(name, ()))
            if one.penalty:
                mask[at, rows[stays(len(rows), one.kept) :]] = 1
        found.append((torch.from_numpy(mask).to(device), strengths))
    return found


def _penalise(
    gradients: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor], tails: Sequence[Tail] | None, scaling: float
) -> None:
    for at, (mask, strength) in enumerate(tails or ()):
        of_a, of_b = parameters[2 * at] * mask[:, :, None], parameters[2 * at + 1] * mask[:, None, :]
        size_a, size_b = of_a.flatten(1).norm(dim=1), of_b.flatten(1).norm(dim=1)
        # Where one of the norms is zero it has no gradient, and the other one is not pulled.
        pulled = ((size_a > 0) & (size_b > 0)) * strength * scaling
        to_a, to_b = pulled * size_b / size_a.clamp_min(1e-30), pulled * size_a / size_b.clamp_min(1e-30)
        gradients[2 * at].add_(of_a * to_a[:, None, None])
        gradients[2 * at + 1].add_(of_b * to_b[:, None, None])


def _clip(gradients: Sequence[torch.Tensor]) -> None:
    """Each device's gradient to that norm, as `torch.nn.utils.clip_grad_norm_` does."""
    squares = torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients]).sum(dim=0)
    factor = (LARGEST_NORM / (squares.sqrt() + 1e-6)).clamp_max(1.0)[:, None, None]
    for gradient in gradients:
        gradient.mul_(factor)


def _step(
    parameters: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    moments: Sequence[tuple[torch.Tensor, torch.Tensor]],
    rates: torch.Tensor,
    step: int,
) -> None:
    first, second = (1 - beta ** (step + 1) for beta in BETAS)
    for parameter, gradient, (mean, square) in zip(parameters, gradients, moments, strict=True):
        mean.lerp_(gradient, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        parameter.sub_(rates / first * mean / (square.sqrt() / math.sqrt(second) + EPSILON))


def _changes(
    wanted: Sequence[Training], names: Sequence[str], before: Stack, after: Sequence[torch.Tensor], scaling: float
) -> list[Adapter]:
    moved = [(new - old).cpu().numpy() for new, old in zip(after, before.tensors, strict=True)]
    found = []
    for at, one in enumerate(wanted):
        pairs = {}
        for name, a, b in zip(names, moved[::2], moved[1::2], strict=True):
            rows = list(one.rows.get(name, ()))
            if rows:
                up = np.ascontiguousarray(b[at][:, rows]) * np.float32(scaling)
                pairs[name] = Pair(np.ascontiguousarray(a[at][rows]), up)
        found.append(Adapter(pairs))
    return found


def side_by_side(lives: Sequence[Iterator[Any]], engine: Together) -> list[Any]:
    """Runs generators that yield lists of trainings or of judgings, and receive what came of them, to their ends.

    All that are about to train do so together, whatever round each is in.

    Returns:
        what each generator returned.
    """
    ended: dict[int, Any] = {}
    asked: dict[int, Sequence[Training] | Sequence[Judging]] = {}

    def go_on(at: int, answer: Any) -> None:
        try:
            asked[at] = lives[at].send(answer)  # type: ignore[attr-defined]  # a generator
        except StopIteration as end:
            ended[at] = end.value
            asked.pop(at, None)

    for at in range(len(lives)):
        go_on(at, None)
    while asked:
        judged = {at: wanted for at, wanted in asked.items() if wanted and isinstance(wanted[0], Judging)}
        if judged:
            for at, wanted in judged.items():
                go_on(at, [engine.judge(one) for one in wanted if isinstance(one, Judging)])
            continue
        places = list(asked)
        trained = iter(engine.train([one for at in places for one in asked[at] if isinstance(one, Training)]))
        for at in places:
            go_on(at, [next(trained) for _ in asked[at]])
    return [ended[at] for at in range(len(lives))]
