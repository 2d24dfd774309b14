"""Rank bands: cut anywhere, they join to what they were cut from."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.algebra import cut
from edge_runtime.lora.factors import only
from edge_runtime.wire import bands, blobs, codec
from edge_runtime.wire.messages import Band
from tests.strategies import adapters, laws

edges = st.lists(st.integers(-2, 12), max_size=6)


def all_bands(adapter: Adapter, wanted: list[int]) -> list[tuple[int, Adapter]]:
    """Every band of an adapter, with the direction at which it starts."""
    ranges = bands.edges_for(max(adapter.ranks.values(), default=0), wanted)
    return [(start, bands.band(adapter, start, stop)) for start, stop in ranges]


@laws
@given(st.integers(1, 40), edges)
def test_ranges_cover_each_rank_once_and_are_cut_only_at_edges(rank: int, wanted: list[int]) -> None:
    ranges = bands.edges_for(rank, wanted)

    assert [index for start, stop in ranges for index in range(start, stop)] == list(range(rank))
    assert all(start < stop for start, stop in ranges)
    assert {stop for _, stop in ranges} == {edge for edge in wanted if 0 < edge < rank} | {rank}


@laws
@given(st.integers(1, 40), st.permutations([3, 5, 5, 8]))
def test_the_order_of_the_edges_and_repeated_ones_do_not_matter(rank: int, wanted: list[int]) -> None:
    assert bands.edges_for(rank, wanted) == bands.edges_for(rank, [3, 5, 8])


@laws
@given(adapters(least_rank=1), edges)
def test_all_bands_together_are_the_adapter(adapter: Adapter, wanted: list[int]) -> None:
    assert bands.join([part for _, part in all_bands(adapter, wanted)]).digest() == adapter.digest()


@laws
@given(adapters(least_rank=1, least_layers=1), edges, st.integers(1, 9))
def test_the_bands_that_start_below_a_rank_hold_its_first_directions(
    adapter: Adapter, wanted: list[int], held: int
) -> None:
    """What a device does: it takes the bands that start below what it holds, joins and cuts them."""
    joined = bands.join([part for start, part in all_bands(adapter, wanted) if start < held])

    mine = Adapter({name: cut(pair, held) for name, pair in joined.items()})
    assert mine.digest() == Adapter({name: cut(pair, held) for name, pair in adapter.items()}).digest()


@laws
@given(adapters(least_layers=1), st.integers(0, 8), st.integers(0, 8))
def test_a_band_has_the_layers_that_have_any_of_its_directions(adapter: Adapter, start: int, width: int) -> None:
    part = bands.band(adapter, start, start + width)

    assert part.keys() == {name for name, rank in adapter.ranks.items() if rank > start}
    for name, pair in part.items():
        np.testing.assert_array_equal(pair.a, adapter[name].a[start : start + width])
        np.testing.assert_array_equal(pair.b, adapter[name].b[:, start : start + width])


@laws
@given(adapters(least_rank=1, decades=(-3, 2)), edges, st.sampled_from(sorted(codec.CODECS)))
def test_cutting_into_bands_changes_nothing_about_what_is_decoded(
    adapter: Adapter, wanted: list[int], name: str
) -> None:
    """Each rank has its own scale: a device that fetches few bands decodes the same numbers as one that fetches all."""
    whole = codec.decode(codec.encode(adapter, name))
    parts = [codec.decode(codec.encode(part, name)) for _, part in all_bands(adapter, wanted)]

    assert bands.join(parts).digest() == whole.digest()


def test_no_bands_are_an_adapter_without_layers() -> None:
    assert bands.join([]).ranks == {}


@laws
@given(adapters(least_rank=1, least_layers=1), edges, st.sampled_from(["fp32", "int8"]))
def test_a_band_of_each_factor_assembles_to_the_band_of_both(adapter: Adapter, wanted: list[int], packed: str) -> None:
    """And one of them alone to a half of it: of the other factor nothing is there."""
    ref = blobs.describe(b"band", 64)
    whole, halves = [], []
    for start, stop in bands.edges_for(max(adapter.ranks.values()), wanted):
        part = bands.band(adapter, start, stop)
        whole.append(codec.decode(codec.encode(part, packed)))
        for factor in ("a", "b"):
            where = Band(start=start, stop=stop, blob=ref, factor=factor)
            halves.append((where, codec.decode(codec.encode(part, packed, factor=factor))))

    joined = bands.join(whole)
    mine = bands.assembled((where, part) for where, part in halves if where.factor == "a")
    for found, expected in ((bands.assembled(halves), joined), (mine, only(joined, "a"))):
        assert found.ranks == expected.ranks
        for name, pair in expected.items():
            assert np.array_equal(found[name].a, pair.a)
            assert np.array_equal(found[name].b, pair.b)
