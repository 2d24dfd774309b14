"""Blobs: cut, named, counted and put together again."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from edge_runtime.errors import CorruptPayloadError
from edge_runtime.wire.blobs import (
    MAX_CHUNKS,
    BlobRef,
    as_ranges,
    describe,
    digest,
    fits,
    from_ranges,
    join,
    missing,
    split,
)
from tests.strategies import laws

payloads = st.integers(0, 70).flatmap(lambda size: st.binary(min_size=size, max_size=size))
chunk_sizes = st.integers(1, 9)
indices = st.lists(st.integers(0, 60), max_size=40)


def around(chunk_bytes: int) -> list[int]:
    """Sizes at which an off-by-one would show."""
    return [0, 1, chunk_bytes - 1, chunk_bytes, chunk_bytes + 1, 2 * chunk_bytes - 1, 2 * chunk_bytes + 1]


@laws
@given(payloads, chunk_sizes)
def test_what_is_split_is_joined_again(payload: bytes, chunk_bytes: int) -> None:
    ref, chunks = describe(payload, chunk_bytes), split(payload, chunk_bytes)

    assert join(ref, dict(enumerate(chunks))) == payload


@pytest.mark.parametrize("chunk_bytes", [1, 2, 7, 1024])
def test_the_number_and_the_sizes_of_the_chunks_are_known_before_they_arrive(chunk_bytes: int) -> None:
    for size in around(chunk_bytes):
        payload = bytes(size)
        ref, chunks = describe(payload, chunk_bytes), split(payload, chunk_bytes)

        assert ref.size == size
        assert ref.chunks == len(chunks) == max(1, -(-size // chunk_bytes))
        assert [ref.chunk_size(index) for index in range(ref.chunks)] == [len(chunk) for chunk in chunks]
        assert join(ref, dict(enumerate(chunks))) == payload


def test_an_empty_blob_is_one_empty_chunk() -> None:
    assert split(b"", 10) == [b""]
    assert describe(b"", 10).chunks == 1


@laws
@given(payloads)
def test_a_blob_is_named_by_its_sha256(payload: bytes) -> None:
    assert describe(payload).sha256 == digest(payload) == hashlib.sha256(payload).hexdigest()


@laws
@given(payloads, chunk_sizes, st.sets(st.integers(0, 80)))
def test_what_is_missing_is_what_is_not_there(payload: bytes, chunk_bytes: int, have: set[int]) -> None:
    ref = describe(payload, chunk_bytes)
    absent = missing(ref, have)

    assert absent == sorted(absent)
    assert set(absent) == set(range(ref.chunks)) - have


@laws
@given(payloads, chunk_sizes, st.data())
def test_a_blob_with_a_missing_chunk_is_not_joined(payload: bytes, chunk_bytes: int, data: st.DataObject) -> None:
    ref, chunks = describe(payload, chunk_bytes), dict(enumerate(split(payload, chunk_bytes)))
    del chunks[data.draw(st.sampled_from(sorted(chunks)))]

    with pytest.raises(CorruptPayloadError, match=f"lacks 1 of {ref.chunks}"):
        join(ref, chunks)


@laws
@given(payloads, payloads, chunk_sizes)
def test_other_bytes_than_the_named_ones_are_refused(payload: bytes, other: bytes, chunk_bytes: int) -> None:
    assume(payload != other)
    ref = describe(payload, chunk_bytes)
    chunks = dict.fromkeys(range(ref.chunks), b"") | dict(enumerate(split(other, chunk_bytes)))
    assume(b"".join(chunks[index] for index in range(ref.chunks)) != payload)

    with pytest.raises(CorruptPayloadError, match=ref.sha256[:12]):
        join(ref, chunks)


def test_chunks_in_the_wrong_order_are_refused() -> None:
    ref = describe(b"abcdef", 3)

    with pytest.raises(CorruptPayloadError):
        join(ref, {0: b"def", 1: b"abc"})


@laws
@given(payloads, chunk_sizes, st.integers(-3, 80), st.integers(0, 12))
@example(b"", 4, 0, 0)
@example(b"abcd", 4, 1, 0)
def test_only_a_chunk_of_the_right_place_and_size_fits(payload: bytes, chunk_bytes: int, index: int, size: int) -> None:
    chunks = split(payload, chunk_bytes)
    expected = 0 <= index < len(chunks) and len(chunks[index]) == size

    assert fits(describe(payload, chunk_bytes), index, bytes(size)) == expected


@laws
@given(indices)
def test_indices_survive_as_ranges(found: list[int]) -> None:
    ranges = as_ranges(found)

    assert from_ranges(ranges, 61) == sorted(set(found))
    assert all(start < stop for start, stop in ranges)
    # As few ranges as there can be: no two of them touch.
    assert {stop for _, stop in ranges}.isdisjoint(start for start, _ in ranges)


@laws
@given(st.lists(st.tuples(st.integers(-9, 99), st.integers(-9, 99))), st.integers(0, 50))
@example([(0, 1 << 40)] * 9, 50)
@example([(-(1 << 70), 1 << 70)], 3)
def test_ranges_from_outside_name_no_index_twice_and_none_that_does_not_exist(
    ranges: list[tuple[int, int]], limit: int
) -> None:
    expected = [index for index in range(limit) if any(start <= index < stop for start, stop in ranges)]

    assert from_ranges(ranges, limit) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"sha256": "0" * 63},
        {"sha256": "0" * 65},
        {"sha256": "G" * 64},
        {"sha256": "A" * 64},
        {"sha256": "0" * 64 + "\n"},
        {"size": -1},
        {"chunk_bytes": 0},
        {"size": MAX_CHUNKS + 1, "chunk_bytes": 1},
        {"size": 1 << 200},
    ],
)
def test_a_reference_that_names_no_possible_blob_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        BlobRef.model_validate({"sha256": "0" * 64, "size": 10, "chunk_bytes": 4, **wrong})


def test_a_reference_may_have_as_many_chunks_as_are_permitted() -> None:
    assert BlobRef(sha256="0" * 64, size=MAX_CHUNKS, chunk_bytes=1).chunks == MAX_CHUNKS
