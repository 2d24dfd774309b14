"""Hostile blobs: whatever arrives, an adapter of finite numbers comes out, or an error of the wire."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_runtime.errors import CorruptPayloadError, UnknownCodecError, WireError
from edge_runtime.wire import codec
from edge_runtime.wire.codec import CODECS, decode, encode
from tests.strategies import gaussian, laws, layer_names
from tests.wire.blobcraft import one, packed, relabelled, repacked, tags

every_codec = pytest.mark.parametrize("name", sorted(CODECS))

LIMIT = 1 << 20
"""Enough for every blob in this file."""


def harmless(blob: bytes) -> None:
    try:
        adapter = decode(blob, LIMIT)
    except WireError:
        return
    for pair in adapter.values():
        assert np.isfinite(pair.a).all()
        assert np.isfinite(pair.b).all()


@laws
@given(st.binary(max_size=200))
@example(b"")
@example(b"\x28\xb5\x2f\xfd")
@example(b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip")
def test_random_bytes_are_refused(blob: bytes) -> None:
    with pytest.raises(WireError):
        decode(blob, LIMIT)


@every_codec
@laws
@given(st.data())
def test_a_truncated_blob_is_refused(name: str, data: st.DataObject) -> None:
    blob = encode(one(gaussian((3, 4), 2, 0)), name)

    with pytest.raises(CorruptPayloadError):
        decode(blob[: data.draw(st.integers(0, len(blob) - 1))], LIMIT)


def flipped(content: bytes, data: st.DataObject) -> bytes:
    """The bytes with a few bits turned over."""
    found = bytearray(content)
    for bit in data.draw(st.lists(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=4)):
        found[bit // 8] ^= 1 << bit % 8
    return bytes(found)


@every_codec
@laws
@given(st.data())
def test_flipped_bits_do_no_harm(name: str, data: st.DataObject) -> None:
    harmless(flipped(encode(one(gaussian((3, 4), 2, 0)), name), data))


@every_codec
@laws
@given(st.data())
def test_flipped_bits_below_the_compression_do_no_harm(name: str, data: st.DataObject) -> None:
    harmless(repacked(lambda raw: flipped(raw, data), encode(one(gaussian((3, 4), 2, 0)), name)))


@every_codec
@laws
@given(st.data())
def test_content_cut_or_spliced_below_the_compression_does_no_harm(name: str, data: st.DataObject) -> None:
    def spliced(raw: bytes) -> bytes:
        start, stop = sorted(data.draw(st.tuples(st.integers(0, len(raw)), st.integers(0, len(raw)))))
        return raw[:start] + data.draw(st.binary(max_size=20)) + raw[stop:]

    harmless(repacked(spliced, encode(one(gaussian((3, 4), 2, 0)), name)))


sizes = st.one_of(st.integers(0, 4), st.sampled_from([1 << 16, 1 << 31, 1 << 62, (1 << 63) - 1, 1 << 64, -1]))
dtypes = st.sampled_from(["F32", "F16", "I8", "F64", "I64", "U8", "BOOL", "BF16", "F8_E4M3", "F4", "C64", "x"])
described = st.builds(
    lambda dtype, shape, start, size: {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]},
    dtypes,
    st.lists(sizes, max_size=3),
    st.integers(0, 20),
    st.integers(0, 64),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
keys = st.builds("{}:{}".format, layer_names, st.sampled_from(["a", "b", "a:scale", "b:scale", "a:", "c", ""]))


@every_codec
@laws
@given(st.dictionaries(keys, described | json_values, max_size=4), st.binary(max_size=64))
def test_any_header_does_no_harm(name: str, header: dict[str, Any], body: bytes) -> None:
    harmless(packed({"__metadata__": tags(name), **header}, body))


@laws
@given(json_values | st.dictionaries(st.just("__metadata__"), json_values))
def test_a_header_without_a_codec_is_refused(header: object) -> None:
    with pytest.raises(WireError):
        decode(packed(header), LIMIT)


@pytest.mark.parametrize("header", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"__metadata__": NaN}', b"9" * 5000])
def test_a_header_that_is_not_json_is_refused(header: bytes) -> None:
    with pytest.raises(CorruptPayloadError):
        decode(packed(header), LIMIT)


def test_a_codec_of_the_future_is_refused_by_name() -> None:
    future = {key: value.replace("fp32", "fp1") for key, value in tags("fp32").items()}

    with pytest.raises(UnknownCodecError, match="fp1"):
        decode(relabelled(future, {}), LIMIT)


def test_a_format_of_the_future_is_refused_by_name() -> None:
    future = {key: value.replace(codec.FORMAT, "99") for key, value in tags("fp16").items()}

    with pytest.raises(UnknownCodecError, match="99"):
        decode(relabelled(future, {}), LIMIT)


def wrong(**changed: Any) -> dict[str, Any]:
    """The int8 tensors of a 3 x 4 layer of rank 2, some replaced; None leaves one out."""
    found = {
        "x:a": np.ones((2, 4), np.int8), "x:a:scale": np.ones(2, np.float32),
        "x:b": np.ones((3, 2), np.int8), "x:b:scale": np.ones(2, np.float32),
    }  # fmt: skip
    found |= {"x:" + key.replace("_", ":"): value for key, value in changed.items()}
    return {key: value for key, value in found.items() if value is not None}


def test_the_tensors_below_are_wrong_by_nothing_else() -> None:
    assert decode(relabelled(tags("int8"), wrong()), LIMIT).shapes == {"x": (3, 4)}


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(wrong(a=None), id="no a"),
        pytest.param(wrong(b=None, b_scale=None), id="no b at all"),
        pytest.param(wrong(a_scale=None), id="no scale"),
        pytest.param(wrong(a=np.ones((3, 4), np.int8), a_scale=np.ones(3, np.float32)), id="ranks differ"),
        pytest.param(wrong(a=np.ones(4, np.int8)), id="a vector"),
        pytest.param(wrong(a=np.ones((2, 4, 1), np.int8)), id="three axes"),
        pytest.param(wrong(a=np.array(1, np.int8)), id="a number"),
        pytest.param(wrong(a_scale=np.ones((2, 1), np.float32)), id="a scale of two axes"),
        pytest.param(wrong(a_scale=np.full(2, np.nan, np.float32)), id="a scale of NaN"),
        pytest.param(wrong(a_scale=np.full(2, 3e38, np.float32), a=np.full((2, 4), 127, np.int8)), id="overflow"),
        pytest.param({"x": np.ones((2, 2), np.float32)}, id="no factor in the name"),
        pytest.param({":a": np.ones((2, 2), np.int8)}, id="no layer in the name"),
        pytest.param({"x:c": np.ones((2, 2), np.int8)}, id="no such factor"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(CorruptPayloadError):
        decode(relabelled(tags("int8"), parts), LIMIT)


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(wrong(a=np.ones((1, 4), np.int8), b_scale=np.ones(1, np.float32)), id="one row for two scales"),
        pytest.param(wrong(a_scale=np.ones(1, np.float32)), id="one scale for two rows"),
        pytest.param(wrong(a=np.ones(4, np.int8), a_scale=np.ones(2, np.float32)), id="a vector under two scales"),
    ],
)
def test_scales_are_never_stretched_over_a_matrix_of_another_rank(parts: dict[str, Any]) -> None:
    """Broadcasting would turn two short tensors of a small blob into a matrix of their sizes' product."""
    with pytest.raises(CorruptPayloadError):
        decode(relabelled(tags("int8"), parts), LIMIT)
