"""Slices on the wire: a blob says of which directions it is a change, and what is owed follows those that stay."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import CorruptPayloadError
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import decompose, take, to_pair
from edge_runtime.lora.slices import FRESH, slice_of
from edge_runtime.wire import codec, feedback, layout, update
from edge_runtime.wire.update import Terms
from tests.strategies import gaussian, laws
from tests.wire.blobcraft import same

LAYER = "model.layers.0.q_proj"
SHAPE = (24, 40)

slices = st.sets(st.one_of(st.integers(0, 40), st.integers(FRESH, FRESH + 9)), min_size=1, max_size=9).map(sorted)


def change_of(rank: int, seed: int = 0, size: float = 0.1) -> Adapter:
    pair = gaussian(SHAPE, rank, seed)
    return Adapter({LAYER: Pair(pair.a * np.float32(size), pair.b * np.float32(size))})


def slice_in(whole: Pair, directions: tuple[int, ...]) -> Adapter:
    return Adapter({LAYER: slice_of(LAYER, whole, directions, 1)})


@laws
@given(slices, st.sampled_from(["fp32", "int4", "auto"]))
def test_the_numbers_of_a_slice_come_back(directions: list[int], name: str) -> None:
    change = change_of(len(directions))
    before = Adapter({LAYER: gaussian(SHAPE, len(directions), 1)})
    made = update.make(change, before, feedback.NONE, Terms(name), {LAYER: tuple(directions)})
    found, numbers = codec.decode_slice(made.payload)

    assert numbers == {LAYER: tuple(directions)}
    assert same(found, made.sent)


def test_a_prefix_costs_no_byte_and_another_slice_a_few() -> None:
    change = change_of(4)
    plain = codec.encode(change, "int8")

    assert codec.encode(change, "int8", {LAYER: (0, 1, 2, 3)}) == plain
    assert codec.decode_slice(plain)[1] == {LAYER: (0, 1, 2, 3)}
    assert len(codec.encode(change, "int8", {LAYER: (3, 7, 8, FRESH)})) < len(plain) + 40


@pytest.mark.parametrize("numbers", [(0,), (1, 0), (1, 1), (-1, 2), (0, 1, 2)])
def test_numbers_that_are_no_slice_are_not_packed(numbers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected 2 ascending numbers"):
        codec.encode(change_of(2), "int8", {LAYER: numbers})


@pytest.mark.parametrize(
    "ranges",
    [
        [], [[0, 2]], [[1, 2]], [[1, 4]], [[2, 3], [1, 2]], [[1, 2], [2, 3]], [[1, 1], [2, 4]], [[-2, 0]], "x", 3,
        [[1]], [["1", 3]], [[1.0, 3]], [[1, 1 << 40]], {"1": 3}, [[3, 1]],
    ],
)  # fmt: skip
def test_ranges_that_do_not_ascend_or_fit_are_refused(ranges: object) -> None:
    row = [LAYER, *SHAPE, [["int8", 2]], [["int8", 2]], ranges]
    with pytest.raises(CorruptPayloadError, match="in the layout of a blob"):
        layout.load(json.loads(json.dumps([row])), 1 << 20)


def test_a_row_with_more_than_it_should_have_is_refused() -> None:
    with pytest.raises(CorruptPayloadError, match="in the layout of a blob"):
        layout.load([[LAYER, *SHAPE, [["int8", 2]], [["int8", 2]], [[1, 3]], 0]], 1 << 20)


# ── what is owed ──────────────────────────────────────────────────────────────────────────────────────────────────


def handed_out(rank: int, seed: int = 0) -> Pair:
    return to_pair(decompose([(1.0, gaussian(SHAPE, rank, seed))]), 0, rank)


def paid(whole: Pair, then: tuple[int, ...], now: tuple[int, ...], debt: Adapter) -> tuple[Pair, Mapping[int, int]]:
    """What a change of zero carries of a debt of the slice `then`; and where in both slices the same direction is."""
    residual = feedback.Residual(debt, slice_in(whole, then), {LAYER: then})
    nothing = change_of(len(now), size=0.0)
    found = feedback.wanted(nothing, slice_in(whole, now), residual, {LAYER: now})
    return found[LAYER], {now.index(at): then.index(at) for at in set(now) & set(then)}


@laws
@given(st.integers(0, 1 << 20), st.sets(st.integers(0, 7), min_size=1), st.sets(st.integers(0, 7), min_size=1))
def test_what_is_owed_goes_with_the_directions_that_the_slice_keeps_and_with_no_other(
    seed: int, then: set[int], now: set[int]
) -> None:
    debt = change_of(len(then), seed)
    found, kept = paid(handed_out(8), tuple(sorted(then)), tuple(sorted(now)), debt)
    for row in range(found.rank):
        expected = debt[LAYER].a[kept[row]] if row in kept else np.zeros(SHAPE[1])
        np.testing.assert_allclose(found.a[row], expected, atol=1e-4)
        expected = debt[LAYER].b[:, kept[row]] if row in kept else np.zeros(SHAPE[0])
        np.testing.assert_allclose(found.b[:, row], expected, atol=1e-4)


def test_fresh_directions_of_two_versions_have_nothing_to_pay_each_other() -> None:
    whole, debt = handed_out(8), change_of(3)
    numbers = (FRESH, FRESH + 1, FRESH + 2)
    old = Adapter({LAYER: slice_of(LAYER, whole, numbers, 1)})
    new = Adapter({LAYER: slice_of(LAYER, whole, numbers, 2)})
    residual = feedback.Residual(debt, old, {LAYER: numbers})
    found = feedback.wanted(change_of(3, size=0.0), new, residual, {LAYER: numbers})

    assert np.linalg.norm(found[LAYER].product()) < 1e-6


def test_a_device_that_steps_down_still_owes_in_the_directions_that_are_left() -> None:
    whole, debt = handed_out(8), change_of(4)
    residual = feedback.Residual(debt, Adapter({LAYER: take(whole, range(4))}))
    found = feedback.wanted(change_of(2, size=0.0), Adapter({LAYER: take(whole, range(2))}), residual)

    np.testing.assert_allclose(found[LAYER].a, debt[LAYER].a[:2], atol=1e-5)


@laws
@given(slices)
def test_a_residual_remembers_its_slice_over_a_restart(directions: list[int]) -> None:
    change = change_of(len(directions))
    before = Adapter({LAYER: gaussian(SHAPE, len(directions), 1)})
    made = update.make(change, before, feedback.NONE, Terms("int2"), {LAYER: tuple(directions)})
    back = feedback.load(feedback.dump(made.residual))

    assert back.directions == made.residual.directions
    assert bool(back.directions) == (directions != list(range(len(directions))))
    assert back.slice.digest() == before.digest()
