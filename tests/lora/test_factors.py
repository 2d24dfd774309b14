"""One factor without the other: what is named stays bit for bit, and the rest is gone or another's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from edge_runtime.lora.adapter import Adapter, Deferred, Pair
from edge_runtime.lora.factors import Factors, exchanged, numbers_in, only
from tests.strategies import adapters, laws


@laws
@given(adapters())
def test_the_two_halves_of_an_adapter_add_up_to_it(adapter: Adapter) -> None:
    a, b = only(adapter, "a"), only(adapter, "b")
    for name, pair in adapter.items():
        assert np.array_equal(a[name].a + b[name].a, pair.a)
        assert np.array_equal(a[name].b + b[name].b, pair.b)
        assert not a[name].b.any()
        assert not b[name].a.any()
    assert only(adapter, "ab") is adapter
    assert exchanged(exchanged(b, a, "a"), adapter, "b").digest() == adapter.digest()


@laws
@given(adapters())
def test_numbers_of_the_halves_are_those_of_the_whole(adapter: Adapter) -> None:
    assert numbers_in(adapter.sizes, "a") + numbers_in(adapter.sizes, "b") == adapter.parameters
    assert numbers_in(adapter.sizes, "ab") == adapter.parameters
    assert numbers_in(adapter.sizes, "a") == sum(pair.a.size for pair in adapter.values())


@pytest.mark.parametrize("factor", ["a", "b"])
def test_layers_on_the_disk_stay_there(factor: Factors) -> None:
    asked: list[str] = []

    def made(name: str) -> Pair:
        asked.append(name)
        return Pair(np.ones((1, 3), np.float32), np.ones((2, 1), np.float32))

    whole = Adapter(Deferred({"q": (2, 3, 1)}, made))
    assert only(whole, factor).sizes == whole.sizes
    assert not asked


@laws
@given(adapters(least_layers=1, least_rank=1))
def test_a_factor_of_another_size_is_not_taken(adapter: Adapter) -> None:
    smaller = Adapter({name: type(pair)(pair.a[1:], pair.b[:, 1:]) for name, pair in adapter.items()})
    assert exchanged(adapter, smaller, "b").digest() == adapter.digest()
    assert exchanged(adapter, Adapter({}), "a").digest() == adapter.digest()
