"""`auto`: within the budget, the same every time, and bytes go where they remove most."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import UnknownCodecError
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import changed
from edge_runtime.wire import allocate, feedback, update
from edge_runtime.wire.allocate import LADDER
from edge_runtime.wire.codec import CODECS, decode, encode
from edge_runtime.wire.update import Terms
from tests.strategies import adapters, gaussian, laws

NAMES = [codec for codec, _, _ in LADDER]


def case(seed: int, rank: int = 6) -> tuple[Adapter, Adapter]:
    """A change and the slice it changes; later directions of b are smaller, as in a spectrum."""
    received, change = {}, {}
    for index, shape in enumerate([(96, 64), (64, 128), (48, 48)]):
        whole, by = gaussian(shape, rank, seed + index), gaussian(shape, rank, seed + index + 10)
        fall = np.exp(-np.arange(rank)).astype(np.float32)
        received[f"l{index}"] = Pair(whole.a * np.float32(0.1), whole.b * fall)
        change[f"l{index}"] = Pair(by.a * np.float32(0.01), by.b * (np.float32(0.1) * fall))
    return Adapter(change), Adapter(received)


def lost(change: Adapter, received: Adapter, sent: Adapter) -> float:
    """Squared error of the products."""
    return sum(
        float(np.sum((changed(received[x], change[x]).product() - changed(received[x], sent[x]).product()) ** 2))
        for x in change
    )


def rungs(change: Adapter, received: Adapter, budget: int) -> dict[tuple[str, str, int], int]:
    """(layer, factor, direction) → rung of the ladder."""
    return {
        (layer.name, factor, at): NAMES.index(codec)
        for layer in allocate.choose(allocate.order(change, received), budget)
        for factor, runs in (("a", layer.a), ("b", layer.b))
        for at, codec in enumerate(codec for codec, count in runs for _ in range(count))
    }


@laws
@given(st.integers(0, 1 << 20), st.integers(400, 20_000))
def test_an_update_fits_its_budget_and_the_choice_is_repeatable(seed: int, budget: int) -> None:
    change, received = case(seed)
    terms = Terms("auto", upload_bytes=budget)
    made, again = (update.make(change, received, feedback.NONE, terms) for _ in range(2))

    assert len(made.payload) <= budget
    assert made.payload == again.payload
    assert made.sent.ranks == change.ranks


@laws
@given(st.integers(0, 1 << 20))
def test_more_bytes_never_take_a_rung_away(seed: int) -> None:
    change, received = case(seed)
    found = [rungs(change, received, budget) for budget in (0, 500, 2000, 8000, 1 << 20)]

    for less, more in itertools.pairwise(found):
        assert all(less[key] <= more[key] for key in less)
    assert set(found[0].values()) == {0}
    assert set(found[-1].values()) == {len(LADDER) - 1}


@laws
@given(st.integers(0, 1 << 20))
def test_of_equal_length_what_moves_the_product_more_is_sent_at_least_as_well(seed: int) -> None:
    change, received = case(seed)
    weights = allocate.weigh(change, received)
    found = rungs(change, received, 1500)
    square = [("a", 0), ("b", 1)]
    entries = [(weights["l2"][i][at], found["l2", factor, at]) for factor, i in square for at in range(6)]

    ordered = [rung for _, rung in sorted(entries)]
    assert ordered == sorted(ordered)


@pytest.mark.parametrize("name", ["int2", "int3", "int4"])
def test_within_the_bytes_of_a_uniform_codec_it_loses_less(name: str) -> None:
    change, received = case(0, rank=16)
    plain = encode(change, name)
    made = update.make(change, received, feedback.NONE, Terms("auto", upload_bytes=len(plain)))

    assert lost(change, received, made.sent) < lost(change, received, decode(plain))


def test_a_direction_that_nothing_moved_is_not_sent() -> None:
    change, received = case(0)
    change["l0"].a[2:], change["l0"].b[:, 2:] = 0, 0
    found = rungs(change, received, 1 << 20)

    assert {rung for (layer, _, at), rung in found.items() if layer == "l0" and at >= 2} == {0}


@laws
@given(adapters(decades=(-3, 2)))
def test_any_change_can_be_sent(change: Adapter) -> None:
    """Ranks of zero, zeros, a single number, no layer at all."""
    made = update.make(change, change, feedback.NONE, Terms("auto"))

    assert made.sent.ranks == change.ranks


def test_the_smallest_limit_holds_and_without_any_the_default() -> None:
    assert allocate.budget_of(1000, (500, None)) == 500
    assert allocate.budget_of(1000, (500, 200)) == 200
    assert allocate.budget_of(1000, (None, None)) == int(1000 * allocate.DEFAULT_BITS / 8)


def test_each_rung_gains_less_for_a_bit_than_the_one_below() -> None:
    bits, error = (np.array(column) for column in list(zip(*LADDER, strict=True))[1:])
    slopes = -np.diff(error) / np.diff(bits)

    assert set(NAMES) <= CODECS.keys()
    assert np.all(np.diff(slopes) < 0)


def test_it_says_what_it_chose() -> None:
    change, received = case(0)
    made = update.make(change, received, feedback.NONE, Terms("auto", upload_bytes=700))

    assert made.how.startswith("auto (")
    assert "% int1" in made.how


def test_a_codec_that_sends_nothing_is_none_for_a_fleet() -> None:
    with pytest.raises(UnknownCodecError, match="sends nothing"):
        update.bits_up("none")
    with pytest.raises(UnknownCodecError, match="auto"):
        update.bits_down("auto")
    assert update.bits_up("auto") == allocate.DEFAULT_BITS
    assert update.bits_up("int8") == update.bits_down("int8") == 8
