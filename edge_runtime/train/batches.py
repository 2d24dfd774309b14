"""Examples of unequal length as one pair of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edge_runtime.train.data import IGNORED, Tokenised

# Any token will do: padding carries no label, and a causal model does not look to the right.
_PADDING_TOKEN = 0


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples side by side, padded on the right to the longest.

    Attributes:
        input_ids: (examples, length), int64.
        labels: (examples, length), int64; IGNORED outside completions.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor


def collate(examples: Sequence[Tokenised], device: torch.device) -> Batch:
    """Pad examples to the longest among them; no longer, since every padded token costs a forward pass."""
    length = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), length), _PADDING_TOKEN, dtype=torch.int64)
    labels = torch.full((len(examples), length), IGNORED, dtype=torch.int64)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids, dtype=torch.int64)
        labels[row, : len(example.labels)] = torch.tensor(example.labels, dtype=torch.int64)
    return Batch(input_ids.to(device), labels.to(device))
