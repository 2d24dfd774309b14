"""Pair, Adapter and Slot: what they refuse, what they count, and what a digest tells apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_runtime.lora.adapter import Adapter, LayerSlot, Matrix, Pair, Slot
from tests.strategies import adapters, gaussian, laws, layer_names, pairs, slots


@pytest.mark.parametrize(
    ("a", "b"),
    [
        pytest.param((2, 3), (4, 3), id="ranks differ"),
        pytest.param((2,), (4, 2), id="a is a vector"),
        pytest.param((2, 3), (4,), id="b is a vector"),
        pytest.param((2, 3, 1), (4, 2), id="a has three axes"),
        pytest.param((3, 2), (2, 4), id="factors swapped"),
        pytest.param((0, 3), (4, 1), id="only a is empty"),
    ],
)
def test_factors_that_do_not_fit_are_refused_with_both_shapes(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="found") as refusal:
        Pair(np.zeros(a, np.float32), np.zeros(b, np.float32))

    assert str(a) in str(refusal.value)
    assert str(b) in str(refusal.value)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32])
def test_factors_of_another_type_than_float32_are_refused(dtype: type) -> None:
    good: Matrix = np.zeros((2, 3), np.float32)
    bad: NDArray[Any] = np.zeros((4, 2), dtype)

    with pytest.raises(ValueError, match=np.dtype(dtype).name):
        Pair(good, bad)
    with pytest.raises(ValueError, match=np.dtype(dtype).name):
        Pair(bad.T, good.T)


@laws
@given(pairs())
def test_a_pair_knows_its_rank_its_shape_and_its_product(pair: Pair) -> None:
    assert pair.a.shape == (pair.rank, pair.shape[1])
    assert pair.b.shape == (pair.shape[0], pair.rank)
    assert pair.product().shape == pair.shape
    np.testing.assert_array_equal(pair.product(), pair.b @ pair.a)


@laws
@given(adapters())
def test_an_adapter_is_a_mapping_in_the_order_of_its_names(adapter: Adapter) -> None:
    names = list(adapter)

    assert names == sorted(names)
    assert len(adapter) == len(names)
    assert all(adapter[name] is adapter.layers[name] for name in names)
    assert adapter.ranks == {name: adapter[name].rank for name in names}
    assert adapter.shapes == {name: adapter[name].shape for name in names}
    assert adapter.parameters == sum(adapter[n].rank * sum(adapter[n].shape) for n in names)


@laws
@given(adapters())
def test_the_digest_sees_neither_the_order_nor_the_memory_layout_of_what_it_is_given(adapter: Adapter) -> None:
    again = Adapter(
        {
            name: Pair(np.asfortranarray(pair.a), np.asfortranarray(pair.b))
            for name, pair in reversed(list(adapter.items()))
        }
    )

    assert again.digest() == adapter.digest()


@laws
@given(adapters(least_layers=1, least_rank=1), st.data())
def test_one_changed_bit_changes_the_digest(adapter: Adapter, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(adapter)))
    pair = adapter[name]
    a, b = pair.a.copy(), pair.b.copy()
    factor: Matrix = data.draw(st.sampled_from([a, b]))
    bits = factor.reshape(-1).view(np.uint32)
    bits[data.draw(st.integers(0, bits.size - 1))] ^= np.uint32(1 << data.draw(st.integers(0, 31)))

    assert Adapter({**adapter, name: Pair(a, b)}).digest() != adapter.digest()


@laws
@given(adapters(least_layers=1), layer_names)
def test_a_renamed_or_missing_layer_changes_the_digest(adapter: Adapter, other: str) -> None:
    first, *rest = adapter
    kept = {name: adapter[name] for name in rest}

    assert Adapter(kept).digest() != adapter.digest()
    if other not in adapter:
        assert Adapter({**kept, other: adapter[first]}).digest() != adapter.digest()


def test_equal_bytes_in_other_shapes_have_other_digests() -> None:
    flat = np.arange(12, dtype=np.float32)
    tall = Pair(flat.reshape(2, 6), np.zeros((3, 2), np.float32))
    wide = Pair(flat.reshape(3, 4), np.zeros((2, 3), np.float32))

    assert Adapter({"x": tall}).digest() != Adapter({"x": wide}).digest()


def test_two_layers_that_swap_their_pairs_have_another_digest() -> None:
    one, two = gaussian((3, 4), 2, 1), gaussian((3, 4), 2, 2)

    assert Adapter({"x": one, "y": two}).digest() != Adapter({"x": two, "y": one}).digest()


@pytest.mark.parametrize(("held", "trained"), [(2, 3), (0, 1), (4, -1), (-1, -1)])
def test_a_device_cannot_train_what_it_does_not_hold(held: int, trained: int) -> None:
    with pytest.raises(ValueError, match="held"):
        LayerSlot(4, 4, held, trained)


@laws
@given(slots())
def test_a_slot_says_what_is_held_and_what_of_it_is_trained(slot: Slot) -> None:
    assert list(slot.layers) == sorted(slot.layers)
    assert slot.held.keys() == slot.layers.keys() == slot.shapes.keys()
    assert slot.trained.keys() <= slot.held.keys()
    assert all(0 < trained <= slot.held[name] for name, trained in slot.trained.items())
    assert all(slot.layers[name].trained == 0 for name in slot.held.keys() - slot.trained.keys())


@laws
@given(slots())
def test_slots_are_equal_when_their_layers_are_whatever_the_order(slot: Slot) -> None:
    assert Slot(dict(reversed(list(slot.layers.items())))) == slot
