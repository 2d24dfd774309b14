"""Tokenised examples in one flat array, in memory or mapped from a file: four bytes for a token and its label.

A token that bears loss is stored as its id, any other as the id's complement (-1 - id): the sign is the label mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from edge_runtime.train.data import IGNORED, Tokenised

Stored = npt.NDArray[np.int32]
Lengths = npt.NDArray[np.int64]


def encode(tokenised: Tokenised) -> Stored:
    """(t,) int32: ids of learned tokens, complements of all others."""
    ids = np.array(tokenised.input_ids, dtype=np.int32)
    return np.where(np.array(tokenised.labels, dtype=np.int64) == IGNORED, ~ids, ids)


def decode(stored: Stored) -> Tokenised:
    """What `encode` was given."""
    ids = np.where(stored < 0, ~stored, stored)
    labels = np.where(stored < 0, np.int32(IGNORED), stored)
    return Tokenised(tuple(ids.tolist()), tuple(labels.tolist()))


class FlatTokens(Sequence[Tokenised]):
    """Examples that become tuples when they are asked for, and not before.

    Args:
        stored: (tokens,) int32, all examples one behind the other as `encode` made them; may be a memory map.
        offsets: (examples + 1,) int64, where each begins, and the end.
        learned: (examples,) int64, the tokens of each that bear loss.
    """

    def __init__(self, stored: Stored, offsets: Lengths, learned: Lengths) -> None:
        self._stored, self._offsets, self._learned = stored, offsets, learned

    @property
    def lengths(self) -> Lengths:
        """(examples,) int64: tokens of each example; reads none of them."""
        return np.diff(self._offsets)

    @property
    def learned(self) -> Lengths:
        """(examples,) int64: tokens of each example that bear loss; reads none of them."""
        return self._learned

    def __len__(self) -> int:
        return len(self._learned)

    @overload
    def __getitem__(self, index: int) -> Tokenised: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tokenised]: ...
    def __getitem__(self, index: int | slice) -> Tokenised | Sequence[Tokenised]:
        if isinstance(index, slice):
            return tuple(self[each] for each in range(*index.indices(len(self))))
        place = range(len(self))[index]  # negative ones count from the end, and one beyond it is an IndexError
        return decode(self._stored[self._offsets[place] : self._offsets[place + 1]])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__: Any = None


def lengths_of(examples: Sequence[Tokenised]) -> Lengths:
    """(examples,) int64: tokens of each example, without reading them where that is possible."""
    if isinstance(examples, FlatTokens):
        return examples.lengths
    return np.array([len(example.input_ids) for example in examples], dtype=np.int64)
