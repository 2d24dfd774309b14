"""Whom a round asks: by hash, so that no message names anybody."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.wire.sampling import FULL, number_of
from server.choosing import named, others, sampled, threshold
from server.fleet import Member
from server.rows import Rows
from server.state import State, asks, recounted
from tests.runtime.said import BASE, hello, sample
from tests.server.life import policy

names = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=6)
fleets = st.dictionaries(names, st.booleans(), max_size=12)
fractions = st.floats(0.01, 1.0)
seeds = st.integers(0, 99)


def fleet(online: Iterable[tuple[str, bool]], number: int = 1) -> State:
    """A fleet in a round that asks nobody yet."""
    members = Rows({name: Member(hello=hello(name), online=there) for name, there in online})
    return recounted(State(run="one", phase="train", round=number, base=BASE, members=members))


def opened(state: State, fraction: float, seed: int = 0, over: float = 1.0) -> State:
    """The same fleet in a round that asks this fraction."""
    sample, needed = sampled(state, state.round, policy(fraction_train=fraction, over_select=over, seed=seed))
    return recounted(state.model_copy(update={"sample": sample, "needed": needed}))


@given(fleets, fractions, st.integers(1, 99), seeds)
def test_a_round_asks_the_fraction_of_those_online(
    members: dict[str, bool], fraction: float, number: int, seed: int
) -> None:
    state = opened(fleet(members.items(), number), fraction, seed)
    online = {name for name, there in members.items() if there}
    assert set(state.asked) <= online
    assert list(state.asked) == sorted(set(state.asked))
    assert len(state.asked) == math.ceil(fraction * len(online))
    assert state.tally.asked == state.tally.late == len(state.asked)


@given(fleets, fractions, st.integers(1, 99), seeds, st.randoms(use_true_random=False))
def test_every_server_that_knows_the_same_members_asks_the_same(
    members: dict[str, bool], fraction: float, number: int, seed: int, random: Random
) -> None:
    shuffled = list(members.items())
    random.shuffle(shuffled)
    assert (
        opened(fleet(shuffled, number), fraction, seed).sample
        == opened(fleet(members.items(), number), fraction, seed).sample
    )


@given(fleets, st.integers(1, 99), seeds)
def test_a_larger_fraction_asks_the_same_devices_and_more(members: dict[str, bool], number: int, seed: int) -> None:
    asked = [set(opened(fleet(members.items(), number), fraction, seed).asked) for fraction in (0.2, 0.5, 1.0)]
    assert asked[0] <= asked[1] <= asked[2]


def test_turns_change_from_round_to_round_and_come_to_everybody() -> None:
    devices = [(f"device-{index}", True) for index in range(8)]
    turns = [opened(fleet(devices, number), 0.25).asked for number in range(1, 201)]
    counts = Counter(name for asked in turns for name in asked)
    assert len(set(turns)) > 8
    assert set(counts) == {name for name, _ in devices}
    assert min(counts.values()) > 20, "of 50 expected"
    assert turns != [opened(fleet(devices, number), 0.25, seed=1).asked for number in range(1, 201)]


def test_a_round_that_over_selects_asks_more_and_needs_the_fraction() -> None:
    state = opened(fleet((f"device-{index}", True) for index in range(20)), 0.25, over=1.6)
    assert (len(state.asked), state.needed) == (8, 5)
    everybody = opened(fleet((f"device-{index}", True) for index in range(20)), 0.5, over=9.0)
    assert (everybody.sample.below, everybody.needed) == (FULL, 10)


@given(fleets, st.integers(0, 6), seeds)
def test_those_asked_instead_are_the_next_by_number(members: dict[str, bool], count: int, seed: int) -> None:
    state = opened(fleet(members.items()), 0.3, seed)
    sample, found = others(state, count, 0.3)
    spare = [name for name, there in members.items() if there and name not in state.asked]
    numbers = {name: number_of(seed, 1, name) for name in members}
    count = count if state.asked else math.ceil(0.3 * len(spare))
    assert set(found) == set(sorted(spare, key=numbers.__getitem__)[:count])
    if found:
        wider = recounted(state.model_copy(update={"sample": sample}))
        assert set(wider.asked) == {*state.asked, *found}


@given(st.lists(names, unique=True), st.integers(0, 20), seeds)
def test_a_threshold_asks_as_many_as_it_should(found: list[str], count: int, seed: int) -> None:
    below = threshold(found, count, seed=seed, round_number=7)
    assert sum(number_of(seed, 7, name) < below for name in found) == min(count, len(found))


@pytest.mark.parametrize(("round_number", "asked"), [(3, "b"), (2, "a"), (1, ""), (4, "")])
def test_of_former_rounds_it_is_known_whom_they_asked_as_long_as_their_updates_count(
    round_number: int, asked: str
) -> None:
    samples = {"sample": sample(3, "b", among="ab"), "past": (sample(2, "a", among="ab"),)}
    state = fleet([("a", True), ("b", True)], 3).model_copy(update=samples)
    assert "".join(name for name in "ab" if asks(state, name, round_number)) == asked


def test_numbers_are_uniform_and_independent_of_each_other() -> None:
    numbers = [number_of(0, 1, f"device-{index}") / FULL for index in range(4000)]
    assert abs(sum(numbers) / 4000 - 0.5) < 4 * (1 / 12 / 4000) ** 0.5
    again = [number_of(0, 2, f"device-{index}") / FULL for index in range(4000)]
    both = sum((x - 0.5) * (y - 0.5) for x, y in zip(numbers, again, strict=True)) / 4000 * 12
    assert abs(both) < 4 / 4000**0.5


def test_a_note_names_a_few_and_counts_the_rest() -> None:
    assert named(["a", "b"]) == "a, b"
    assert named([f"d{index}" for index in range(10)]).endswith("d7 and 2 more")
