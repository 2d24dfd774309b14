"""Packs hold every example once, never too much, and waste little."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import DataError
from edge_runtime.train.packing import fill, pack

CAPACITY = 64
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=60)


def fillings(lengths: list[int]) -> list[int]:
    return sorted(sum(lengths[index] for index in members) for members in pack(lengths, CAPACITY))


@given(LENGTHS)
def test_every_example_is_in_one_pack_and_no_pack_is_too_full(lengths: list[int]) -> None:
    packs = pack(lengths, CAPACITY)

    assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
    assert all(members and sum(lengths[index] for index in members) <= CAPACITY for members in packs)
    assert all(list(members) == sorted(members) for members in packs)


@given(LENGTHS)
def test_the_packs_are_more_than_half_full_but_for_one(lengths: list[int]) -> None:
    packs = pack(lengths, CAPACITY)

    assert -(-sum(lengths) // CAPACITY) <= len(packs) <= 2 * sum(lengths) / CAPACITY + 1
    assert sum(2 * full <= CAPACITY for full in fillings(lengths)) <= 1


@given(LENGTHS, st.integers(0, 9))
def test_the_fillings_do_not_depend_on_the_order(lengths: list[int], seed: int) -> None:
    assert fillings(random.Random(seed).sample(lengths, len(lengths))) == fillings(lengths)


def test_the_longest_example_opens_the_first_pack_and_equal_ones_go_in_turn() -> None:
    assert pack([3, 10, 4, 6, 3], 10) == ((1,), (2, 3), (0, 4))
    assert pack([5, 5, 5, 5], 10) == ((0, 1), (2, 3))
    assert pack([], 10) == ()


@given(LENGTHS.filter(bool))
def test_the_fill_is_the_share_of_the_capacity_that_holds_tokens(lengths: list[int]) -> None:
    packs = pack(lengths, CAPACITY)

    share = fill(packs, lengths, CAPACITY)

    assert share == pytest.approx(sum(full / CAPACITY for full in fillings(lengths)) / len(packs))
    assert 0 < share <= 1


def test_one_pack_for_each_example_of_full_length_is_full() -> None:
    assert fill(pack([10, 10], 10), [10, 10], 10) == 1.0
    assert fill((), [], 10) == 1.0


def test_an_example_that_fits_no_pack_is_refused_with_both_numbers() -> None:
    with pytest.raises(DataError, match=r"at most 10 tokens.*found one of 11; cut"):
        pack([3, 11], 10)


def test_lengths_and_capacities_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="capacity=0"):
        pack([1], 0)
    with pytest.raises(ValueError, match="at least 1 token"):
        pack([1, 0], 4)
