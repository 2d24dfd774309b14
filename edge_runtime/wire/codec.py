"""Codecs: an adapter to bytes and back. A payload carries its tags, so the two ends need not agree on settings.

A blob is zstd(safetensors(tagged tensors)). Each factor is packed by one codec of the literal table CODECS; the tag
in the safetensors header names that codec, and the receiver obeys the tag. Nothing is ever unpickled, and sizes are
checked before anything is allocated.

Packing may lose precision. Whoever packs can know exactly what was lost: `decode(encode(x))` is what the other end
has, bit for bit. The server subtracts that, not what it meant to send.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
import zstandard
from numpy.typing import NDArray

from edge_runtime.errors import CorruptPayloadError, TooLargeError, UnknownCodecError, WireError, unknown_name
from edge_runtime.lora.adapter import Adapter, Matrix, Pair

Tensors = Mapping[str, NDArray[np.generic]]

FORMAT = "1"
ZSTD_LEVEL = 6
MAX_DECODED_BYTES = 1 << 30
"""Default bound of a decompressed blob. A rank-64 adapter of all projections of a 7B model in fp32 is 0.64 GB."""


class Codec(NamedTuple):
    """How one factor is packed. `axis` is the one that counts ranks: 0 for `a`, 1 for `b`.

    Attributes:
        pack: (matrix, axis) → tensors by part name; the main part is named "".
        unpack: (tensors by part name, axis) → float32 matrix.
        size: (shape, axis) → bytes before zstd, without packing anything.
    """

    pack: Callable[[Matrix, int], dict[str, NDArray[np.generic]]]
    unpack: Callable[[Tensors, int], Matrix]
    size: Callable[[tuple[int, int], int], int]


def _pack_fp32(x: Matrix, _axis: int) -> dict[str, NDArray[np.generic]]:
    return {"": x}


def _pack_fp16(x: Matrix, _axis: int) -> dict[str, NDArray[np.generic]]:
    if x.size and float(np.abs(x).max()) > float(np.finfo(np.float16).max):
        raise WireError(
            f"fp16 holds values up to 65504; found {float(np.abs(x).max()):.3g}; use the codec int8 or fp32"
        )
    return {"": x.astype(np.float16)}


def _unpack_float(parts: Tensors, _axis: int) -> Matrix:
    return parts[""].astype(np.float32)


def _pack_int8(x: Matrix, axis: int) -> dict[str, NDArray[np.generic]]:
    # A scale for each rank: directions of a converged adapter differ in size by orders of magnitude.
    peak = np.abs(x).max(axis=1 - axis, initial=0.0, keepdims=True)
    scale = (peak / 127).astype(np.float32)
    steps = np.rint(np.divide(x, scale, out=np.zeros_like(x), where=scale > 0))
    return {"": steps.clip(-127, 127).astype(np.int8), "scale": scale.reshape(-1)}


def _unpack_int8(parts: Tensors, axis: int) -> Matrix:
    steps, scale = parts[""], parts["scale"].astype(np.float32)
    # numpy would stretch unlike shapes over each other: a small blob could become a matrix too large for the memory.
    if steps.ndim != 2 or scale.shape != (steps.shape[axis],):
        raise ValueError(f"int8 is a matrix and one scale for each rank; found shapes {steps.shape} and {scale.shape}")
    return steps.astype(np.float32) * (scale[:, None] if axis == 0 else scale[None, :])


CODECS: Mapping[str, Codec] = {
    "fp32": Codec(_pack_fp32, _unpack_float, lambda shape, _axis: 4 * shape[0] * shape[1]),
    "fp16": Codec(_pack_fp16, _unpack_float, lambda shape, _axis: 2 * shape[0] * shape[1]),
    "int8": Codec(_pack_int8, _unpack_int8, lambda shape, axis: shape[0] * shape[1] + 4 * shape[axis]),
}

AXES: Mapping[str, int] = {"a": 0, "b": 1}
"""The factors of a pair, and the axis along which each counts its ranks."""


def codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        UnknownCodecError: no such codec; lists those there are.
    """
    try:
        return CODECS[name]
    except KeyError:
        raise UnknownCodecError(unknown_name("codec", name, CODECS)) from None


def encode(adapter: Adapter, name: str) -> bytes:
    """An adapter as a blob: every factor packed by the codec of that name.

    The same adapter and codec give the same bytes.

    Raises:
        UnknownCodecError: no such codec.
        WireError: a value that the codec cannot hold.
    """
    chosen = codec(name)
    tensors: dict[str, NDArray[np.generic]] = {}
    for layer, pair in adapter.items():
        for factor, axis in AXES.items():
            parts = chosen.pack(np.ascontiguousarray(getattr(pair, factor)), axis)
            tensors |= {_key(layer, factor, part): np.ascontiguousarray(value) for part, value in parts.items()}
    # One entry: safetensors writes several in any order, and equal adapters shall be equal bytes.
    raw = safetensors.numpy.save(tensors, metadata={"edge": f"{FORMAT}:{name}"})
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True).compress(raw)


def decode(blob: bytes, limit: int = MAX_DECODED_BYTES) -> Adapter:
    """The adapter in a blob, as the tags in it say.

    Raises:
        TooLargeError: the blob declares more than `limit` bytes; nothing was decompressed.
        CorruptPayloadError: it does not decompress or parse, lacks a part, or holds NaN or infinity.
        UnknownCodecError: packed by a codec that this version does not know.
    """
    raw = _decompress(blob, limit)
    chosen = codec(_tag(raw))
    try:
        tensors = safetensors.numpy.load(raw)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise CorruptPayloadError(f"a blob is not a safetensors file ({error}); ask the sender again") from error
    factors: dict[str, dict[str, dict[str, NDArray[np.generic]]]] = {}
    for key, value in tensors.items():
        layer, factor, part = _parts(key)
        factors.setdefault(layer, {}).setdefault(factor, {})[part] = value
    return Adapter({layer: _pair(layer, parts, chosen) for layer, parts in factors.items()})


def estimate(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], name: str) -> int:
    """Bytes of an adapter of these (d_out, d_in) shapes and ranks under a codec, before zstd and without packing it."""
    chosen = codec(name)
    return sum(
        chosen.size((ranks[layer], d_in), AXES["a"]) + chosen.size((d_out, ranks[layer]), AXES["b"])
        for layer, (d_out, d_in) in shapes.items()
        if ranks.get(layer)
    )


def _key(layer: str, factor: str, part: str) -> str:
    return f"{layer}:{factor}:{part}" if part else f"{layer}:{factor}"


def _parts(key: str) -> tuple[str, str, str]:
    layer, _, rest = key.partition(":")
    factor, _, part = rest.partition(":")
    if not layer or factor not in AXES:
        raise CorruptPayloadError(f"a tensor is named 'layer:a' or 'layer:b'; found {key!r}; ask the sender again")
    return layer, factor, part


def _pair(layer: str, parts: Mapping[str, Tensors], chosen: Codec) -> Pair:
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            a, b = (chosen.unpack(parts[factor], axis) for factor, axis in AXES.items())
        pair = Pair(a, b)
    except (KeyError, ValueError, IndexError) as error:
        raise CorruptPayloadError(f"layer '{layer}' does not decode ({error}); ask the sender again") from error
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise CorruptPayloadError(f"layer '{layer}' holds NaN or infinity; lower the learning rate of the sender")
    return pair


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


def _tag(raw: bytes) -> str:
    """Name of the codec in the safetensors header: 8 bytes of length, then JSON."""
    length = int.from_bytes(raw[:8], "little")
    try:
        found, _, name = str(json.loads(raw[8 : 8 + length])["__metadata__"]["edge"]).partition(":")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptPayloadError(f"a blob carries its codec in its header; found none ({error})") from error
    if found != FORMAT:
        raise UnknownCodecError(f"blobs are of format {FORMAT}; found {found!r:.40}; update the older end")
    return name
