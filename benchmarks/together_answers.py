"""A causal language model as the subject of `together`: the loss is that of the tokens of answers.

Adapted are layers of the last blocks alone. What the blocks below make of a text is the same for every device, at every
step and in every life, so it is computed once for each text, and kept. Loss and labels are the product's own.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.answers_fleet import Fleet
from benchmarks.together import Chosen, Text, Texts
from edge_runtime.train.checkpointing import decoder_layers
from edge_runtime.train.data import IGNORED, Tokenised, batch_at
from edge_runtime.train.loss import chunked_cross_entropy

TEXTS = 16
"""Texts that are judged, or go through the blocks below, in one pass."""


class Answers:
    """The model of a fleet; see `together.Subject`.

    Args:
        fleet: its model is taken over.
        device: where to compute, in torch's words.
        keep: folder for what the blocks below made of texts; in memory alone where it is not given.
    """

    def __init__(self, fleet: Fleet, device: str = "cpu", keep: Path | None = None) -> None:
        self.model = fleet.model.to(device).requires_grad_(requires_grad=False)
        self.shapes: Mapping[str, tuple[int, int]] = fleet.shapes
        self.scaling, self._each = fleet.scaling, fleet.batch
        self.device = torch.device(device)
        self._backbone = getattr(self.model, self.model.base_model_prefix)
        self._head = self.model.get_output_embeddings()
        blocks = list(decoder_layers(self.model))
        adapted = [any(name in fleet.shapes for name in _paths(self.model, block)) for block in blocks]
        first = adapted.index(True)
        self._below, self._above = blocks[:first], blocks[first:]
        self._states: dict[int, tuple[Text, torch.Tensor]] = {}
        self._keep = keep and keep / f"{fleet.fingerprint[:16]}-{first}"

    def batch_of(self, step: int, lengths: Sequence[int], order: int) -> tuple[int, ...]:
        """As the product's training loop draws them."""
        return batch_at(step, count=len(lengths), micro_batch=self._each, seed=order)

    def losses(self, chosen: Chosen) -> torch.Tensor:
        """(devices,): the mean over the tokens of each one's answers."""
        texts = [[texts[row] for row in rows] for texts, rows in chosen]
        self._know(chain.from_iterable(texts))
        length = max(len(text.input_ids) for mine in texts for text in mine)
        batches = [self._batch(mine, self._each, length) for mine in texts]
        hidden = self._hidden(torch.cat([states for states, _ in batches]))
        found = []
        for mine, (_, labels) in zip(torch.split(hidden, self._each), batches, strict=True):
            kept, targets = _counted(mine, labels)
            total = chunked_cross_entropy(kept, self._head.weight, targets, bias=self._head.bias)
            found.append(total / len(targets))
        return torch.stack(found)

    def judged(self, texts: Texts) -> tuple[float, float]:
        """The mean over the tokens of all answers, and the share of them that the model would have said."""
        self._know(texts)
        total, right, count = 0.0, 0, 0
        ordered = sorted(texts, key=lambda text: len(text.input_ids))
        for first in range(0, len(ordered), TEXTS):
            some = ordered[first : first + TEXTS]
            states, labels = self._batch(some, len(some), len(some[-1].input_ids))
            kept, targets = _counted(self._hidden(states), labels)
            scores = self._head(kept)
            total += float(functional.cross_entropy(scores, targets, reduction="sum"))
            right, count = right + int((scores.argmax(dim=-1) == targets).sum()), count + len(targets)
        return total / count, right / count

    def _hidden(self, states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._backbone.norm(self._through(self._above, states))
        return found

    def _through(self, blocks: Sequence[Any], states: torch.Tensor) -> torch.Tensor:
        """(texts, length, d) before and after blocks; padding is on the right, where a causal model never looks."""
        places = torch.arange(states.shape[1], device=self.device)[None]
        angles = self._backbone.rotary_emb(states, places)
        for block in blocks:
            states = block(states, attention_mask=None, position_ids=places, position_embeddings=angles)
        return states

    def _know(self, texts: Iterable[Text]) -> None:
        """Let the texts that were not seen yet go through the blocks below."""
        new = list({id(text): text for text in texts if id(text) not in self._states}.values())
        new = sorted((text for text in new if not self._remembered(text)), key=lambda text: len(text.input_ids))
        with torch.no_grad():
            for first in range(0, len(new), TEXTS):
                some = new[first : first + TEXTS]
                ids = torch.zeros(len(some), len(some[-1].input_ids), dtype=torch.int64)
                for row, text in enumerate(some):
                    ids[row, : len(text.input_ids)] = torch.tensor(text.input_ids)
                found = self._through(self._below, self._backbone.embed_tokens(ids.to(self.device)))
                for text, states in zip(some, found, strict=True):
                    self._remember(text, states[: len(text.input_ids)].clone())

    def _remembered(self, text: Text) -> bool:
        path = self._path(text)
        if path is None or not path.exists():
            return False
        self._states[id(text)] = text, torch.from_numpy(np.load(path)).to(self.device)
        return True

    def _remember(self, text: Text, states: torch.Tensor) -> None:
        self._states[id(text)] = text, states
        if path := self._path(text):
            path.parent.mkdir(parents=True, exist_ok=True)
            passing = path.with_suffix(f".{os.getpid()}.npy")
            np.save(passing, states.cpu().numpy())
            passing.replace(path)  # another process may be at the same text

    def _path(self, text: Text) -> Path | None:
        digest = hashlib.sha256(array("i", text.input_ids).tobytes()).hexdigest()
        return self._keep and self._keep / f"{digest[:32]}.npy"

    def _batch(self, texts: Texts, each: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """States (each, length, d) and labels (each, length) of known texts; those that are missing have no label."""
        width = self._head.weight.shape[1]
        states = torch.zeros(each, length, width, device=self.device)
        labels = torch.full((each, length), IGNORED, dtype=torch.int64)
        for row, text in enumerate(texts):
            if not isinstance(text, Tokenised):
                raise TypeError(f"expected a text with an answer; found {type(text).__name__}")
            states[row, : len(text.input_ids)] = self._states[id(text)][1]
            labels[row, : len(text.labels)] = torch.tensor(text.labels)
        return states, labels.to(self.device)


def _counted(hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States (tokens, d) that predict a token which counts, and those tokens."""
    targets = labels[:, 1:]
    kept = targets != IGNORED
    return hidden[:, :-1][kept], targets[kept]


def _paths(model: Any, block: Any) -> list[str]:
    inside = {id(module) for module in block.modules()}
    return [name for name, module in model.named_modules() if id(module) in inside]
