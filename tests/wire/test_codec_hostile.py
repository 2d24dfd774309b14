"""Hostile blobs: whatever arrives, an adapter of finite numbers comes out, or an error of the wire."""

from __future__ import annotations

import tracemalloc
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from edge_runtime.errors import CorruptPayloadError, TooLargeError, UnknownCodecError, WireError
from edge_runtime.lora.adapter import Adapter
from edge_runtime.wire import codec
from edge_runtime.wire.codec import CODECS, decode, decode_slice, encode
from tests.strategies import gaussian, laws, layer_names
from tests.wire.blobcraft import laid_out, one, packed, relabelled, repacked, tags

every_codec = pytest.mark.parametrize("name", sorted(CODECS))

LIMIT = 1 << 20
"""Enough for every blob in this file."""


def harmless(blob: bytes) -> bool:
    """Whether a server opens it; if it does, numbers are finite, and each direction has a number of its own."""
    try:
        adapter, directions = decode_slice(blob, LIMIT)
    except WireError:
        return False
    for name, pair in adapter.items():
        assert np.isfinite(pair.a).all()
        assert np.isfinite(pair.b).all()
        assert len(set(directions[name])) == pair.rank
    return True


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


extremes = st.builds(lambda byte, count: byte * count, st.sampled_from([b"\xff", b"\x7f", b"\x00"]), st.integers(1, 20))


@every_codec
@laws
@given(st.data())
def test_bytes_written_over_below_the_compression_do_no_harm(name: str, data: st.DataObject) -> None:
    """All ones is NaN in every type of floating point, which a few flipped bits hardly ever make."""

    def written_over(raw: bytes) -> bytes:
        start, content = data.draw(st.integers(0, len(raw) - 1)), data.draw(extremes | st.binary(max_size=20))
        return (raw[:start] + content + raw[start + len(content) :])[: len(raw)]

    harmless(repacked(written_over, encode(one(gaussian((3, 4), 2, 0)), name)))


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
keys = st.builds("{}{}".format, st.sampled_from(sorted(CODECS)), st.sampled_from(["", ":scale", ":where", ":", ":x"]))
runs = st.lists(st.tuples(st.sampled_from(sorted(CODECS)), sizes), max_size=3)
layouts = st.lists(st.tuples(layer_names, sizes, sizes, runs, runs), max_size=3)


@laws
@given(layouts | json_values, st.dictionaries(keys, described | json_values, max_size=4), st.binary(max_size=64))
def test_any_header_does_no_harm(layout: object, header: dict[str, Any], body: bytes) -> None:
    harmless(packed({"__metadata__": laid_out(layout), **header}, body))


@every_codec
@laws
@given(st.integers(1, 1 << 31), st.integers(1, 1 << 31), st.integers(1, 1 << 31))
@example(1 << 31, 1 << 31, 1 << 31)
@example(1, 1, (1 << 31) - 1)
@example(1, 1, LIMIT // 8)  # as many directions as the limit lets through
@example(1 << 20, 1 << 20, 1)
def test_a_layout_that_promises_more_than_the_limit_costs_nothing(name: str, d_out: int, d_in: int, rank: int) -> None:
    """Neither a rank, nor a side, nor their product: a blob of a few bytes decides over no memory."""
    blob = relabelled(laid_out([["x", d_out, d_in, [[name, rank]], [[name, rank]]]]), {})
    for opened in (decode, decode_slice):
        tracemalloc.start()
        try:
            with suppress(WireError):
                opened(blob, LIMIT)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

        assert peak < 3 * LIMIT


def test_many_small_layers_count_together() -> None:
    layers = [[f"x{i}", 1, 1, [["none", 100]], [["none", 100]]] for i in range(4000)]

    with pytest.raises(TooLargeError, match="describes"):
        decode(relabelled(laid_out(layers), {}), LIMIT)


def test_a_header_is_bounded_before_it_is_parsed() -> None:
    with pytest.raises(CorruptPayloadError, match="at most"):
        decode(packed(b"[" * (codec.MAX_HEADER_BYTES + 1)), 1 << 24)


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(["x", 3, 4, [["fp32", 2]], [["fp32", 1]]], id="ranks differ"),
        pytest.param(["x", 3, 4, [["fp32", -1], ["fp32", 3]], [["fp32", 2]]], id="a negative run"),
        pytest.param(["x", 3, 4, [["fp32", 0]], [["fp32", 0]]], id="an empty run"),
        pytest.param(["x", 0, 4, [["fp32", 1]], [["fp32", 1]]], id="no rows"),
        pytest.param(["x", 3.0, 4, [["fp32", 1]], [["fp32", 1]]], id="half a row"),
        pytest.param(["", 3, 4, [["fp32", 1]], [["fp32", 1]]], id="no name"),
        pytest.param(["x", 3, 4, [["fp32", 1]]], id="no b"),
        pytest.param(["x", 3, 4, "fp32", "fp32"], id="no runs"),
        pytest.param(["x", 3, 4, [[["fp32"], 1]], [["fp32", 1]]], id="no name of a codec"),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(layer: list[object]) -> None:
    with pytest.raises(CorruptPayloadError, match="layout"):
        decode(relabelled(laid_out([layer]), {"fp32": np.zeros(14, np.float32)}), LIMIT)


def test_a_layer_named_twice_is_refused() -> None:
    layer = ["x", 1, 1, [["none", 1]], [["none", 1]]]

    with pytest.raises(CorruptPayloadError, match="twice"):
        decode(relabelled(laid_out([layer, layer]), {}), LIMIT)


@laws
@given(st.binary(min_size=1, max_size=40))
def test_any_bytes_in_the_place_of_symbols_decode_to_finite_numbers(content: bytes) -> None:
    """int2 writes 243 of the 256 bytes, int3 49; the others are read as what remains."""
    for name, digits in ("int2", 5), ("int3", 2), ("int4", 2), ("nf4", 2):
        width = len(content) * digits // 2
        if width:
            pair = gaussian((width, width), 1, 0)
            raw = zstandard.decompress(encode(one(pair), name))
            assert harmless(zstandard.compress(raw[: len(raw) - len(content)] + content))


def test_top_k_with_more_places_than_values_is_refused() -> None:
    pair = gaussian((64, 64), 1, 0)
    raw = zstandard.decompress(encode(one(pair), "topk"))
    places = np.packbits(np.ones(128, bool)).tobytes()

    with pytest.raises(CorruptPayloadError, match="places"):
        decode(zstandard.compress(raw[: -len(places)] + places), LIMIT)


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
    layout = tags(one(gaussian((3, 4), 2, 0)), "fp32")
    future = {key: value.replace("fp32", "fp1") for key, value in layout.items()}

    with pytest.raises(UnknownCodecError, match="fp1"):
        decode(relabelled(future, {}), LIMIT)


def test_a_format_of_the_future_is_refused_by_name() -> None:
    future = {key: value.replace(codec.FORMAT, "99", 1) for key, value in tags(Adapter({}), "fp16").items()}

    with pytest.raises(UnknownCodecError, match="99"):
        decode(relabelled(future, {}), LIMIT)


INT8 = laid_out([["x", 3, 4, [["int8", 2]], [["int8", 2]]]])


def wrong(**changed: Any) -> dict[str, Any]:
    """The int8 streams of a 3 x 4 layer of rank 2, some replaced; None leaves one out."""
    found = {"int8": np.ones(14, np.uint8), "int8:scale": np.ones(4, np.float32)}
    found |= {key.replace("_", ":"): value for key, value in changed.items()}
    return {key: value for key, value in found.items() if value is not None}


def test_the_streams_below_are_wrong_by_nothing_else() -> None:
    assert decode(relabelled(INT8, wrong()), LIMIT).shapes == {"x": (3, 4)}


@pytest.mark.parametrize(
    "streams",
    [
        pytest.param(wrong(int8=None), id="no symbols"),
        pytest.param(wrong(int8_scale=None), id="no scale"),
        pytest.param(wrong(int8=np.ones(13, np.uint8)), id="a symbol too few"),
        pytest.param(wrong(int8=np.ones(15, np.uint8)), id="a symbol too many"),
        pytest.param(wrong(int8=np.ones((2, 7), np.uint8)), id="a matrix"),
        pytest.param(wrong(int8=np.array(1, np.uint8)), id="a number"),
        pytest.param(wrong(int8=np.ones(14, np.int8)), id="another type"),
        pytest.param(wrong(int8_scale=np.ones(1, np.float32)), id="one scale for all"),
        pytest.param(wrong(int8_scale=np.full(4, np.nan, np.float32)), id="a scale of NaN"),
        pytest.param(wrong(int8_scale=np.full(4, 3e38, np.float32)), id="overflow"),
        pytest.param(wrong(fp32=np.ones(1, np.float32)), id="one that the layout does not know"),
    ],
)
def test_streams_that_do_not_fit_the_layout_are_refused(streams: dict[str, Any]) -> None:
    """Nothing is stretched over anything: broadcasting would make a large matrix of a small blob."""
    with pytest.raises(CorruptPayloadError):
        decode(relabelled(INT8, streams), LIMIT)
