"""Examples of unequal length as tensors: packed one behind the other, or padded side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from edge_runtime.train.data import IGNORED, Tokenised

# Any token will do: padding carries no label, and a causal model does not look to the right.
_PADDING_TOKEN = 0


@dataclass(frozen=True, eq=False)
class Packed:
    """Examples one behind the other in a single row, without padding.

    Attributes:
        input_ids: (1, tokens), int64.
        labels: (1, tokens), int64; IGNORED outside completions, and at the first token of each example: the token
            before it belongs to another example, and must not learn to predict it.
        position_ids: (1, tokens), int64; from 0 in each example.
        lengths: tokens of each example, in order; their sum is `tokens`. Attention must stay within each: these are
            the blocks of its block-diagonal mask.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples side by side, padded on the right to the longest.

    Attributes:
        input_ids: (examples, length), int64.
        labels: (examples, length), int64; IGNORED outside completions.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor


def pack_together(examples: Sequence[Tokenised], device: torch.device) -> Packed:
    """The examples of one pack as tensors on a device, in the order given.

    Args:
        examples: at least one, none of them empty.
        device: where the model's embedding is.
    """
    lengths = tuple(len(example.input_ids) for example in examples)
    if not all(lengths) or not lengths:
        raise ValueError(f"a pack has at least one example, none of them empty; found lengths {lengths}")
    rows = (
        list(chain.from_iterable(example.input_ids for example in examples)),
        list(chain.from_iterable((IGNORED, *example.labels[1:]) for example in examples)),
        list(chain.from_iterable(range(length) for length in lengths)),
    )
    # One copy to the device, not three.
    table = torch.tensor(rows, dtype=torch.int64).to(device)
    return Packed(table[0:1], table[1:2], table[2:3], lengths)


def collate(examples: Sequence[Tokenised], device: torch.device) -> Batch:
    """Pad examples to the longest among them; no longer, since every padded token costs a forward pass."""
    length = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), length), _PADDING_TOKEN, dtype=torch.int64)
    labels = torch.full((len(examples), length), IGNORED, dtype=torch.int64)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids, dtype=torch.int64)
        labels[row, : len(example.labels)] = torch.tensor(example.labels, dtype=torch.int64)
    return Batch(input_ids.to(device), labels.to(device))
