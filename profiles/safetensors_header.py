"""The header of a safetensors file: what tensors it holds, without reading any of them.

Source of the format: the README of huggingface/safetensors. 8 bytes N, little-endian; N bytes of JSON, an object of
name → {dtype, shape, data_offsets}; the data, without holes and without overlap.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, TypeGuard

from edge_runtime.errors import BaseModelError, unknown_name
from profiles.brief import brief
from profiles.byte_source import ByteSource, exactly, truncated
from profiles.strict_json import json_object
from profiles.tensors import TensorInfo

LENGTH_BYTES = 8
# The format allows 100 MB. A dense model's header has 130 bytes for a tensor: this is enough for 60,000 of them, and
# what a hostile one can make Python allocate stays within a few hundred MiB.
HEADER_LIMIT = 8 << 20

# Type in the file → (as this project writes it, bits of one element).
DTYPES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 8),
    "F4": ("fp4", 4),
    "F6_E2M3": ("fp6_e2m3", 6),
    "F6_E3M2": ("fp6_e3m2", 6),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E5M2": ("fp8_e5m2", 8),
    "F8_E4M3": ("fp8_e4m3", 8),
    "F8_E8M0": ("fp8_e8m0", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("fp16", 16),
    "BF16": ("bf16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("fp32", 32),
    "C64": ("complex64", 64),
    "F64": ("fp64", 64),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
}


def safetensors_header(source: ByteSource) -> dict[str, TensorInfo]:
    """Name → tensor, in the order of the header; two reads, and never any of the data.

    Raises:
        BaseModelError: the file is cut short or too long, or its header is not what the format asks for.
    """
    (length,) = struct.unpack("<Q", exactly(source, 0, LENGTH_BYTES))
    if source.size is not None and LENGTH_BYTES + length > source.size:
        raise truncated(source, LENGTH_BYTES + length)
    if not 2 <= length <= HEADER_LIMIT:
        raise BaseModelError(
            f"{source.name}: expected a safetensors header of 2 to {HEADER_LIMIT} bytes; found a length of {length}; "
            f"fetch it again"
        )
    header = json_object(exactly(source, LENGTH_BYTES, length), f"{source.name}: its safetensors header")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(source, name, entry) for name, entry in header.items()}
    _check_layout(source, LENGTH_BYTES + length, header)
    return tensors


def _tensor(source: ByteSource, name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict):
        raise _malformed(source, name, "an object", entry)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        problem = unknown_name("dtype", brief(dtype), DTYPES)
        raise BaseModelError(f"{source.name}: the tensor {brief(name)} has an {problem}; fetch it again")
    if not _counts(shape):
        raise _malformed(source, name, "a list of sizes as its shape", shape)
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _malformed(source, name, "a begin and an end as its data_offsets", offsets)
    label, bits = DTYPES[dtype]
    for width in shape:
        bits *= width
    size = offsets[1] - offsets[0]
    if size * 8 != bits:
        raise _malformed(source, name, f"{bits / 8:g} bytes for {dtype} {brief(shape)}", size)
    return TensorInfo(tuple(shape), label, size)


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers that a file could have; and of no more dimensions than a tensor has."""
    if not isinstance(value, list) or len(value) > 8:
        return False
    return all(isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63 for number in value)


def _check_layout(source: ByteSource, start: int, header: Mapping[str, Any]) -> None:
    """Tensors lie one after the other from `start` to the end of the file."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        begin, after = entry["data_offsets"]
        if begin != end:
            raise _malformed(source, name, f"data from {end} on, where the tensor before it ends", begin)
        end = after
    if source.size not in {None, start + end}:
        raise BaseModelError(
            f"expected {source.name} to have {start + end} bytes, as its header says; found {source.size}; fetch it "
            f"again"
        )


def _malformed(source: ByteSource, name: str, expected: str, found: Any) -> BaseModelError:
    return BaseModelError(
        f"{source.name}: expected {expected} of the tensor {brief(name)}; found {brief(found)}; fetch it again"
    )
