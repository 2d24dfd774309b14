"""A classifier as the subject of `together`: its texts have a label each, and its head is frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.together import Chosen, Text, Texts
from benchmarks.wire_fleet import Fleet
from edge_runtime.train import classify
from edge_runtime.train.classify import Labelled
from edge_runtime.train.loss import unwrap

IGNORED = -100
TEXTS = 256
"""Texts that are judged in one pass."""


class Labels:
    """The encoder and the head of a fleet; see `together.Subject`.

    Args:
        fleet: its classifier's model and head are taken over.
        device: where to compute, in torch's words.
    """

    def __init__(self, fleet: Fleet, device: str = "cpu") -> None:
        found = fleet.classifier
        self.model = unwrap(found.live.model).to(device)
        self.shapes: Mapping[str, tuple[int, int]] = fleet.shapes
        self.scaling, self._each = found.live.scaling, fleet.batch
        self.device = torch.device(device)
        self._head = found.head.to(device).requires_grad_(requires_grad=False)
        self._padding = int(found.tokenizer.pad_token_id)
        self._tables: dict[int, Table] = {}

    def batch_of(self, step: int, lengths: Sequence[int], order: int) -> tuple[int, ...]:
        """As `classify.train_classifier` draws them."""
        return classify.batch_of(step, lengths, self._each, order)

    def losses(self, chosen: Chosen) -> torch.Tensor:
        """(devices,): the mean over each one's texts."""
        ids, mask, labels = self._batch([(self._table(texts), rows) for texts, rows in chosen], self._each)
        losses = functional.cross_entropy(self._logits(ids, mask), labels, reduction="none", ignore_index=IGNORED)
        counts = torch.tensor([len(rows) for _, rows in chosen], device=self.device)
        return losses.view(len(chosen), self._each).sum(dim=1) / counts

    def judged(self, texts: Texts) -> tuple[float, float]:
        """The mean over texts."""
        table, total, right = self._table(texts), 0.0, 0
        order = np.argsort(table.lengths, kind="stable")
        for first in range(0, len(order), TEXTS):
            ids, mask, labels = self._batch([(table, order[first : first + TEXTS].tolist())], TEXTS)
            scores = self._logits(ids, mask)
            total += float(functional.cross_entropy(scores, labels, reduction="sum", ignore_index=IGNORED))
            right += int((scores.argmax(dim=-1) == labels).sum())
        return total / len(order), right / len(order)

    def _logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[:, :, None].to(torch.float32)
        found: torch.Tensor = self._head((states * weight).sum(dim=1) / weight.sum(dim=1))
        return found

    def _batch(self, chosen: Sequence[tuple[Table, Sequence[int]]], each: int) -> tuple[torch.Tensor, ...]:
        """Token ids, mask and labels, `each` texts for each device; those that are missing are one token, no label."""
        length = max(int(table.lengths[list(rows)].max()) for table, rows in chosen)
        ids = np.full((len(chosen), each, length), self._padding, np.int64)
        mask = np.zeros((len(chosen), each, length), np.int64)
        labels = np.full((len(chosen), each), IGNORED, np.int64)
        mask[:, :, 0] = 1
        for at, (table, rows) in enumerate(chosen):
            of, width = list(rows), min(length, table.ids.shape[1])
            ids[at, : len(of), :width] = table.ids[of, :width]
            mask[at, : len(of), :width] = np.arange(width) < table.lengths[of, None]
            labels[at, : len(of)] = table.labels[of]
        flat = (ids.reshape(-1, length), mask.reshape(-1, length), labels.reshape(-1))
        return tuple(torch.from_numpy(values).to(self.device, non_blocking=True) for values in flat)

    def _table(self, texts: Texts) -> Table:
        if id(texts) not in self._tables:
            self._tables[id(texts)] = _tabulated(texts, self._padding)
        return self._tables[id(texts)]


@dataclass(frozen=True, eq=False)
class Table:
    """Texts as arrays: ids (texts, longest), lengths and labels (texts,). `texts` keeps them alive."""

    texts: Texts
    ids: np.ndarray[Any, Any]
    lengths: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]


def _tabulated(texts: Texts, padding: int) -> Table:
    lengths = np.asarray([len(text.input_ids) for text in texts])
    ids = np.full((len(texts), int(lengths.max())), padding, np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text.input_ids)] = text.input_ids
    return Table(texts, ids, lengths, np.asarray([_label(text) for text in texts]))


def _label(text: Text) -> int:
    if not isinstance(text, Labelled):
        raise TypeError(f"expected a text with a label; found {type(text).__name__}")
    return text.label
