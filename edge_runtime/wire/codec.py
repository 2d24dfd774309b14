"""Codecs: an adapter to bytes and back. A payload carries its tags, so the two ends need not agree on settings.

A blob is zstd(safetensors(streams)). Its header holds the layout: each layer's size, and which codec of the literal
table CODECS packed which of its directions; the receiver obeys that. What one codec wrote of all layers is one stream,
so that zstd sees like beside like and the header stays small. Nothing is ever unpickled, and sizes are checked before
anything is allocated.

Packing may lose precision. Whoever packs can know exactly what was lost: `decode(encode(x))` is what the other end
has, bit for bit. The server subtracts that, not what it meant to send, and error feedback sends the rest later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import safetensors
import safetensors.numpy
import zstandard
from numpy.typing import NDArray

from edge_runtime.errors import CorruptPayloadError, TooLargeError, UnknownCodecError, WireError, unknown_name
from edge_runtime.lora.adapter import Adapter, Matrix, Pair
from edge_runtime.lora.factors import Factors
from edge_runtime.wire import floats, grids, layout, normal_float, sparse
from edge_runtime.wire.coding import Codec, Part, size
from edge_runtime.wire.layout import Batch, Layer

FORMAT = "2"
ZSTD_LEVEL = 1
"""Higher levels search longer for repetitions, which packed numbers do not have: on updates of real training levels 3
and 6 gain less than 1 % with every codec but top-k (5 %), and cost a third of the speed of fp32."""
MAX_DECODED_BYTES = 1 << 30
"""Default bound of a decompressed blob, and of the adapter in it. A rank-64 adapter of all projections of a 7B model in
fp32 is 0.64 GB."""
NUMBER_BYTES = 40
"""Of the number of a direction in a list: a Python integer and where it is."""
MAX_HEADER_BYTES = 1 << 20
"""Bound of the header, which is parsed as JSON. That of all projections of a 405B model has 0.1 MB."""

NOTHING = Codec(
    lambda _x: {}, lambda _parts, rank, width: np.zeros((rank, width), np.float32), lambda _rank, _width: {}, 0
)
"""Directions that are not sent: they arrive as zeros."""

CODECS: Mapping[str, Codec] = {
    "fp32": floats.FP32,
    "fp16": floats.FP16,
    "bf16": floats.BF16,
    "int8": grids.peak(255),
    "int4": grids.peak(15),
    "nf4": normal_float.NF4,
    "int3": grids.spread(7, 0.75),
    "int2": grids.ternary(0.6),
    "int1": grids.SIGNS,
    "topk": sparse.top(32),
    layout.NOTHING: NOTHING,
}

AXES: Mapping[str, int] = {"a": 0, "b": 1}
"""The factors of a pair, and the axis along which each counts its ranks."""

Streams = Mapping[str, NDArray[np.generic]]


def codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        UnknownCodecError: no such codec; lists those there are.
    """
    try:
        return CODECS[name]
    except KeyError:
        raise UnknownCodecError(unknown_name("codec", name, CODECS)) from None


def encode(
    adapter: Adapter,
    how: str | tuple[Layer, ...],
    directions: Mapping[str, Sequence[int]] | None = None,
    *,
    factor: Factors = "ab",
) -> bytes:
    """An adapter as a blob: packed by the codec of that name, or as a layout says.

    The same adapter and codec give the same bytes.

    Args:
        adapter: what is packed.
        how: by which codec, or codecs.
        directions: of a slice, layer → the numbers of its directions; the first ones where a layer is not named.
        factor: "a" or "b" where the other one is not to travel: it arrives as zeros.

    Raises:
        UnknownCodecError: no such codec.
        WireError: a value that the codec cannot hold, NaN and infinity among them.
    """
    layers = layout.uniform(adapter.shapes, adapter.ranks, how) if isinstance(how, str) else how
    layers = layout.only(layout.sliced(layers, directions or {}), factor)
    if isinstance(how, str):
        codec(how)  # an adapter without layers asks for none
    streams: dict[str, list[NDArray[np.generic]]] = {}
    for batch in layout.batches(layers):
        for part, value in codec(batch.codec).pack(_gathered(adapter, batch)).items():
            streams.setdefault(_key(batch.codec, part), []).append(value)
    tensors = {key: np.concatenate(values) for key, values in streams.items()}
    # One entry: safetensors writes several in any order, and equal adapters shall be equal bytes.
    raw = safetensors.numpy.save(tensors, metadata={"edge": f"{FORMAT}:{layout.dump(layers)}"})
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True).compress(raw)


def decode(blob: bytes, limit: int = MAX_DECODED_BYTES) -> Adapter:
    """The adapter in a blob, as its layout says; `decode_slice` without the numbers of the directions."""
    return _adapter(*_opened(blob, limit))


def decode_slice(blob: bytes, limit: int = MAX_DECODED_BYTES) -> tuple[Adapter, dict[str, tuple[int, ...]]]:
    """The adapter in a blob, and of each layer the numbers of its directions: of what a slice is a change.

    Raises:
        TooLargeError: the blob declares, or its layout describes, more than `limit` bytes; nothing was decompressed, or
            nothing was unpacked.
        CorruptPayloadError: it does not decompress or parse, lacks a part, or holds NaN or infinity.
        UnknownCodecError: packed by a codec that this version does not know.
    """
    raw, layers = _opened(blob, limit)
    listed = NUMBER_BYTES * sum(layer.rank for layer in layers)
    if listed > limit:  # layers of a few numbers a direction, which no model has
        raise TooLargeError(f"a list of directions may take {limit} bytes; this one takes {listed}; raise the limit")
    return _adapter(raw, layers), {layer.name: layer.directions for layer in layers}


def _opened(blob: bytes, limit: int) -> tuple[bytes, tuple[Layer, ...]]:
    """The file in a blob, and what its layout describes; both within the limit."""
    raw = _decompress(blob, limit)
    return raw, layout.load(_tag(raw), limit)


def _adapter(raw: bytes, layers: tuple[Layer, ...]) -> Adapter:
    """The adapter in a file, unpacked."""
    try:
        streams = safetensors.numpy.load(raw)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CorruptPayloadError(f"a blob is not a safetensors file ({error}); ask the sender again") from error
    batches = tuple(layout.batches(layers))
    _check(streams, batches)
    pairs = {
        x.name: Pair(np.empty((x.rank, x.d_in), np.float32), np.empty((x.d_out, x.rank), np.float32)) for x in layers
    }
    at = dict.fromkeys(streams, 0)
    for batch in batches:
        _scatter(_unpacked(batch, streams, at), batch, pairs)
    return Adapter(pairs)


def estimate(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], name: str) -> int:
    """Bytes of an adapter of these (d_out, d_in) shapes and ranks under a codec, before zstd and without packing it."""
    chosen = codec(name)
    layers = layout.uniform(shapes, {layer: rank for layer, rank in ranks.items() if rank}, name)
    return sum(size(chosen, batch.count, batch.width) for batch in layout.batches(layers))


def _gathered(adapter: Adapter, batch: Batch) -> Matrix:
    """The directions of a batch, (count, width)."""
    rows, at = np.empty((batch.count, batch.width), np.float32), 0
    for strip in batch.strips:
        pair, taken = adapter[strip.layer], slice(strip.start, strip.start + strip.count)
        rows[at : at + strip.count] = pair.a[taken] if strip.factor == "a" else pair.b[:, taken].T
        at += strip.count
    if not _finite(rows):
        names = sorted({strip.layer for strip in batch.strips})
        raise WireError(f"one of the layers {', '.join(names):.400} holds NaN or infinity; lower the learning rate")
    return rows


def _scatter(rows: Matrix, batch: Batch, pairs: Mapping[str, Pair]) -> None:
    """Put the directions of a batch where they belong."""
    at = 0
    for strip in batch.strips:
        pair, place = pairs[strip.layer], slice(strip.start, strip.start + strip.count)
        if strip.factor == "a":
            pair.a[place] = rows[at : at + strip.count]
        else:
            pair.b[:, place] = rows[at : at + strip.count].T
        at += strip.count


def _finite(x: Matrix) -> bool:
    # One pass without a temporary array; numbers so large that their sum is infinite are looked at one by one.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(x.sum())) or bool(np.isfinite(x).all())


def _key(name: str, part: str) -> str:
    return f"{name}:{part}" if part else name


def _check(streams: Streams, batches: tuple[Batch, ...]) -> None:
    """Refuse streams that are not exactly those that the layout describes: nothing is stretched, nothing left over."""
    expected: dict[str, Part] = {}
    for batch in batches:
        for name, part in codec(batch.codec).parts(batch.count, batch.width).items():
            key = _key(batch.codec, name)
            expected[key] = Part(part.dtype, part.numbers + (expected[key].numbers if key in expected else 0))
    found = {key: Part(stream.dtype.type, stream.size) for key, stream in streams.items() if stream.ndim == 1}
    if found != expected or len(found) != len(streams):
        key = min(key for key in {*streams, *expected} if found.get(key) != expected.get(key))
        raise CorruptPayloadError(
            f"in a blob, expected {_described(expected.get(key))} as '{key:.40}', found {_described(found.get(key))}; "
            "ask the sender again"
        )


def _described(part: Part | None) -> str:
    return f"{part.numbers} of {np.dtype(part.dtype).name}" if part else "nothing of use"


def _unpacked(batch: Batch, streams: Streams, at: dict[str, int]) -> Matrix:
    """The directions of a batch; moves `at`, the place in each stream, behind them."""
    chosen, parts = codec(batch.codec), {}
    for name, part in chosen.parts(batch.count, batch.width).items():
        key = _key(batch.codec, name)
        parts[name] = streams[key][at[key] : at[key] + part.numbers]
        at[key] += part.numbers
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            rows = chosen.unpack(parts, batch.count, batch.width)
    except ValueError as error:
        raise CorruptPayloadError(f"a part of a blob does not decode ({error}); ask the sender again") from error
    if not _finite(rows):
        raise CorruptPayloadError("a blob holds NaN or infinity; lower the learning rate of the sender")
    return rows


def _decompress(blob: bytes, limit: int) -> bytes:
    try:
        declared = zstandard.frame_content_size(blob)
        if declared < 0:
            raise CorruptPayloadError("a blob declares its decompressed size; this one does not; ask the sender again")
        if declared > limit:
            raise TooLargeError(
                f"a blob may decompress to {limit} bytes; this one declares {declared}; raise the limit"
            )
        return zstandard.ZstdDecompressor().decompress(blob, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptPayloadError(f"a blob is not zstd ({error}); ask the sender again") from error


def _tag(raw: bytes) -> object:
    """The layout in the safetensors header, parsed: 8 bytes of length, then JSON."""
    length = int.from_bytes(raw[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CorruptPayloadError(f"a blob's header has at most {MAX_HEADER_BYTES} bytes; this one declares {length}")
    try:
        found, _, text = str(json.loads(raw[8 : 8 + length])["__metadata__"]["edge"]).partition(":")
        if found != FORMAT:
            raise UnknownCodecError(f"blobs are of format {FORMAT}; found {found!r:.40}; update the older end")
        return json.loads(text)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptPayloadError(f"a blob carries its layout in its header; found none ({error})") from error
