"""Which directions a device trains: every policy, and what both ends make of its choice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import ROW_NORM, cut, take
from edge_runtime.lora.slices import FRESH, LAST, POLICIES, choose, lay_out, slice_of
from tests.strategies import gaussian, laws

LAYER = "model.layers.0.q_proj"


def held(rank: int, seed: int = 0, empty: int = 0) -> Adapter:
    """One layer of that rank, whose last directions hold nothing yet."""
    pair = gaussian((24, 40), rank, seed)
    b = pair.b.copy()
    b[:, rank - empty :] = 0
    return Adapter({LAYER: Pair(pair.a, b)})


def chosen(name: str, received: Adapter, trained: int, version: int = 3) -> tuple[int, ...]:
    scores = {LAYER: np.abs(np.random.default_rng(version).standard_normal(received[LAYER].rank))}
    return choose(name, received, {LAYER: trained}, version, scores)[LAYER]


@pytest.mark.parametrize("name", sorted(POLICIES))
@laws
@given(st.integers(1, 12), st.data())
def test_a_policy_names_as_many_directions_as_are_trained_and_both_ends_see_the_same_slice(
    name: str, rank: int, data: st.DataObject
) -> None:
    """The model holds as many as before, the slice among them, and the server makes the same slice of the numbers."""
    trained, empty = data.draw(st.integers(1, rank)), data.draw(st.integers(0, rank))
    version = data.draw(st.integers(0, 30))
    received = held(rank, empty=empty)
    numbers = chosen(name, received, trained, version)
    found = lay_out(received, {LAYER: numbers}, version)

    assert len(numbers) == trained
    assert list(numbers) == sorted(set(numbers))
    assert found.seen[LAYER].rank == rank
    assert list(found.rows[LAYER]) == sorted(set(found.rows[LAYER]))
    slice_ = slice_of(LAYER, received[LAYER], numbers, version)
    for same in (found.before[LAYER], take(found.seen[LAYER], found.rows[LAYER])):
        assert np.array_equal(same.a, slice_.a)
        assert np.array_equal(same.b, slice_.b)


@pytest.mark.parametrize("name", sorted(POLICIES))
@laws
@given(st.integers(1, 12), st.data())
def test_whoever_holds_more_sees_the_same_slice_in_the_same_directions(
    name: str, most: int, data: st.DataObject
) -> None:
    """What a device holds is the first part of what others hold; its numbers mean the same to them and the server."""
    rank = data.draw(st.integers(1, most))
    whole = held(most, empty=data.draw(st.integers(0, most)))
    received = Adapter({LAYER: cut(whole[LAYER], rank)})
    version = data.draw(st.integers(0, 30))
    numbers = chosen(name, received, data.draw(st.integers(1, rank)), version)
    small, large = (lay_out(of, {LAYER: numbers}, version).before[LAYER] for of in (received, whole))

    assert np.array_equal(small.a, large.a)
    assert np.array_equal(small.b, large.b)


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"rotating"}))
@laws
@given(st.integers(1, 12), st.data())
def test_whoever_trains_fewer_directions_trains_those_that_others_train_too(
    name: str, rank: int, data: st.DataObject
) -> None:
    """Of devices that hold the same, and whose data say the same. A window is the exception: its start moves by r."""
    received = held(rank, empty=data.draw(st.integers(0, rank)))
    many = data.draw(st.integers(1, rank // 2 if name == "fresh" and rank > 1 else rank))
    few = data.draw(st.integers(1, many))

    assert set(chosen(name, received, few)) <= set(chosen(name, received, many))


def test_the_first_version_has_no_spectrum_and_every_policy_but_last_takes_the_first_directions() -> None:
    received = held(8, empty=8)
    assert choose(LAST, received, {LAYER: 3}, 0) == {LAYER: (5, 6, 7)}
    for name in POLICIES.keys() - {LAST}:
        assert choose(name, received, {LAYER: 3}, 0, {LAYER: np.zeros(8)}) == {LAYER: (0, 1, 2)}


def test_a_rotating_window_comes_to_every_direction_and_then_begins_again() -> None:
    windows = [chosen("rotating", held(6), 2, version) for version in range(4)]

    assert windows == [(0, 1), (2, 3), (4, 5), (0, 1)]
    assert chosen("rotating", held(5), 2, 2) == (0, 4), "a window that does not divide what is held goes round"


def test_personal_takes_what_matters_most() -> None:
    scores = {LAYER: np.array([0.1, 3.0, 0.0, 2.0, 2.0])}

    assert choose("personal", held(5), {LAYER: 2}, 1, scores) == {LAYER: (1, 3)}
    with pytest.raises(ValueError, match="expected a score for each of 4"):
        choose("personal", held(4), {LAYER: 2}, 1, scores)
    with pytest.raises(ValueError, match="expected a score"):
        choose("personal", held(4), {LAYER: 2}, 1)


def test_fresh_takes_refilled_directions_first_and_appends_what_is_missing() -> None:
    assert chosen("fresh", held(8, empty=4), 3) == (4, 5, 6)
    assert chosen("fresh", held(8, empty=1), 3) == (7, FRESH, FRESH + 1)
    assert chosen("fresh", held(8), 3) == (FRESH, FRESH + 1, FRESH + 2)
    assert chosen("fresh", held(5), 3) == (0, 1, 2), "no room beside what matters most"


def test_appended_directions_are_orthogonal_zero_in_effect_and_new_in_each_version_and_layer() -> None:
    received = held(8)
    found = lay_out(received, {LAYER: chosen("fresh", received, 3)}, 3)
    slice_ = found.before[LAYER]

    np.testing.assert_allclose(slice_.a @ slice_.a.T, ROW_NORM**2 * np.eye(3), atol=1e-6)
    assert not slice_.b.any()
    np.testing.assert_allclose(found.seen[LAYER].product(), take(received[LAYER], range(5)).product(), atol=1e-5)
    elsewhere = ((LAYER, 4), ("x", 3))
    others = [slice_of(layer, received[LAYER], (FRESH,), version) for layer, version in elsewhere]
    assert all(abs(float((other.a @ slice_.a[0]).item())) < 0.9 * ROW_NORM**2 for other in others)


def test_devices_of_unequal_rank_share_their_fresh_directions() -> None:
    few, many = (slice_of(LAYER, held(8)[LAYER], range(FRESH, FRESH + count), 2) for count in (2, 5))

    np.testing.assert_allclose(few.a, many.a[:2], atol=1e-6)


@pytest.mark.parametrize(
    "numbers", [(1, 0), (1, 1), (0, 8), (FRESH + 1,), (0, FRESH, FRESH + 2), range(FRESH, FRESH + 41)]
)
def test_numbers_that_are_no_slice_are_refused(numbers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"direction"):
        slice_of(LAYER, held(8)[LAYER], numbers, 1)


def test_an_unknown_policy_is_told_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"unknown slice 'best'; expected one of: .*personal"):
        choose("best", held(4), {LAYER: 2}, 1)


def test_a_layer_that_is_only_held_has_no_slice() -> None:
    assert choose("top", held(4), {LAYER: 0}, 1) == {}
    assert lay_out(held(4), {}, 1).seen.ranks == {LAYER: 4}
