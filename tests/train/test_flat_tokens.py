"""Tokens and their label mask in four bytes each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.train.data import IGNORED, Tokenised
from edge_runtime.train.flat_tokens import FlatTokens, decode, encode, lengths_of


@st.composite
def _tokenised(draw: st.DrawFn) -> Tokenised:
    ids = draw(st.lists(st.integers(0, 2**31 - 1), max_size=20))
    learned = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    return Tokenised(tuple(ids), tuple(i if bears else IGNORED for i, bears in zip(ids, learned, strict=True)))


def flat(examples: list[Tokenised]) -> FlatTokens:
    stored = np.concatenate([np.zeros(0, dtype=np.int32), *(encode(example) for example in examples)])
    ends = np.cumsum([0, *(len(example.input_ids) for example in examples)], dtype=np.int64)
    return FlatTokens(stored, ends, np.array([example.learned for example in examples], dtype=np.int64))


@given(_tokenised())
def test_tokens_come_back_as_they_were(tokenised: Tokenised) -> None:
    stored = encode(tokenised)

    assert stored.nbytes == 4 * len(tokenised.input_ids)
    assert decode(stored) == tokenised


@given(st.lists(_tokenised(), max_size=8), st.integers(-9, 9), st.integers(-9, 9))
def test_it_is_read_like_the_sequence_it_was_made_of(examples: list[Tokenised], low: int, high: int) -> None:
    found = flat(examples)

    assert found == examples
    assert list(found) == examples
    assert found[low:high] == tuple(examples[low:high])
    assert lengths_of(found).tolist() == lengths_of(examples).tolist() == [len(one.input_ids) for one in examples]
    assert found.learned.tolist() == [one.learned for one in examples]


def test_places_count_from_both_ends_and_none_is_beyond_them() -> None:
    examples = [Tokenised((1, 2), (IGNORED, 2)), Tokenised((3,), (3,))]
    found = flat(examples)

    assert (found[-1], found[-2]) == (examples[1], examples[0])
    for beyond in (2, -3):
        with pytest.raises(IndexError):
            found[beyond]
    assert found != examples[:1]
    assert found != "ab"
