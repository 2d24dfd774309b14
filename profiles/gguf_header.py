"""The header of a GGUF file: settings and tensors, without reading weights and without keeping the tokenizer.

Source of the format: ggml's `docs/gguf.md` and `gguf.cpp`; versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from edge_runtime.errors import BaseModelError, unknown_name
from profiles.brief import brief
from profiles.byte_source import ByteSource, truncated
from profiles.tensors import TensorInfo

MAGIC = b"GGUF"
VERSIONS = (2, 3)

# The longest headers are those of tokenizers with 200,000 tokens and 450,000 merges: about 15 MB. Beyond these limits a
# file is hostile or torn.
HEADER_LIMIT = 32 << 20
PAIRS_LIMIT = 10_000
TENSORS_LIMIT = 20_000
DIMENSIONS_LIMIT = 4
"""ggml's own."""
TEXT_LIMIT = 4096
"""Longer texts (chat templates) are passed over, in bytes; of keys and names it is the limit."""
FIRST_WINDOW, LAST_WINDOW = 256 << 10, 4 << 20
"""Bytes that are asked for at once; they double from the first to the last."""

_STRING, _ARRAY = 8, 9
# Type of a value → its struct format.
SCALARS: Mapping[int, struct.Struct] = {
    number: struct.Struct(f"<{code}")
    for number, code in {
        0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"
    }.items()
}  # fmt: skip

# Type of a tensor → (name, elements of a block, bytes of a block). Source: GGML_QUANT_SIZES of gguf-py 0.19.
TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("fp32", 1, 4),
    1: ("fp16", 1, 2),
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    9: ("q8_1", 32, 40),
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    15: ("q8_k", 256, 292),
    16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136),
    24: ("int8", 1, 1),
    25: ("int16", 1, 2),
    26: ("int32", 1, 4),
    27: ("int64", 1, 8),
    28: ("fp64", 1, 8),
    29: ("iq1_m", 256, 56),
    30: ("bf16", 1, 2),
    34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66),
    39: ("mxfp4", 32, 17),
    40: ("nvfp4", 64, 36),
    41: ("q1_0", 128, 18),
}


@dataclass(frozen=True)
class PassedOver:
    """A value that was not kept: an array, or a long text.

    Attributes:
        what: in words, such as "an array of 49152".
    """

    what: str


Value = int | float | bool | str | PassedOver


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the weights.

    Attributes:
        metadata: key → value.
        tensors: name in the file → tensor, in the order of the file; shapes in torch's order.
    """

    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]


def gguf_header(source: ByteSource) -> GgufHeader:
    """Read the header of a GGUF file, as much of it as needed and in growing pieces.

    Raises:
        BaseModelError: no GGUF, another version or byte order, cut short anywhere (the weights included), or counts,
            lengths, types or offsets that no such file can have.
    """
    cursor = _Cursor(source)
    _check_version(cursor)
    tensor_count, pair_count = cursor.number("<Q"), cursor.number("<Q")
    if tensor_count > TENSORS_LIMIT or pair_count > PAIRS_LIMIT:
        raise cursor.error(
            f"expected at most {TENSORS_LIMIT} tensors and {PAIRS_LIMIT} settings; found {tensor_count} and "
            f"{pair_count}"
        )
    metadata: dict[str, Value] = {}
    for _ in range(pair_count):
        key = cursor.text("the key of a setting")
        if key in metadata:
            raise cursor.error(f"expected each setting once; found {brief(key)} again")
        metadata[key] = _value(cursor, cursor.number("<I"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.error(f"expected a power of two as general.alignment; found {brief(alignment)}")
    return GgufHeader(metadata, _tensors(cursor, tensor_count, alignment))


@dataclass
class _Cursor:
    """Reads forward through a file, a window at a time, and never beyond `HEADER_LIMIT`."""

    source: ByteSource
    at: int = 0
    window: bytes = field(default=b"", repr=False)
    start: int = 0
    reach: int = FIRST_WINDOW

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        begin = self.at
        self.skip(count)
        if begin + count > self.start + len(self.window):
            self.window = self.source.read(begin, max(count, self.reach))
            self.start, self.reach = begin, min(2 * self.reach, LAST_WINDOW)
            if len(self.window) < count:
                raise truncated(self.source, begin + count)
        return self.window[begin - self.start : begin - self.start + count]

    def skip(self, count: int) -> None:
        """Go on by `count` bytes without reading them."""
        end = self.at + count
        if self.source.size is not None and end > self.source.size:
            raise truncated(self.source, end)
        if end > HEADER_LIMIT:
            raise self.error(f"expected a header of at most {HEADER_LIMIT} bytes; found one of {end} or more")
        self.at = end

    def skip_texts(self, count: int) -> None:
        """Pass over an array of texts: 100,000 of them in a tokenizer, so their lengths are read in place."""
        length = struct.Struct("<Q")
        while count:
            self.take(length.size)
            at, last = self.at - length.size - self.start, len(self.window) - length.size
            begin = at
            while count and at <= last:
                at += length.size + length.unpack_from(self.window, at)[0]
                count -= 1
            self.at = self.start + begin
            self.skip(at - begin)

    def number(self, code: str) -> int:
        """The next whole number."""
        (number,) = struct.unpack(code, self.take(struct.calcsize(code)))
        return int(number)

    def text(self, what: str) -> str:
        """The next text, which may not be longer than `TEXT_LIMIT`."""
        length = self.number("<Q")
        if length > TEXT_LIMIT:
            raise self.error(f"expected {what} of at most {TEXT_LIMIT} bytes; found one of {length}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"expected {what} in UTF-8; found other bytes before byte {self.at}") from error

    def error(self, problem: str) -> BaseModelError:
        """The error for a header that is not what the format asks for."""
        return BaseModelError(f"{self.source.name} as a GGUF file: {problem}; fetch it again")


def _check_version(cursor: _Cursor) -> None:
    magic = cursor.take(len(MAGIC))
    if magic != MAGIC:
        raise cursor.error(f"expected it to begin with {MAGIC!r}; found {magic!r}")
    raw = cursor.take(4)
    version = int.from_bytes(raw, "little")
    if version in VERSIONS:
        return
    if int.from_bytes(raw, "big") in (1, *VERSIONS):
        raise cursor.error("expected little-endian numbers; found a big-endian file, for another kind of machine")
    raise cursor.error(f"expected version {' or '.join(map(str, VERSIONS))}; found {version}")


def _value(cursor: _Cursor, kind: int) -> Value:
    if kind in SCALARS:
        (value,) = SCALARS[kind].unpack(cursor.take(SCALARS[kind].size))
        number: int | float | bool = value
        return number
    if kind == _STRING:
        length = cursor.number("<Q")
        if length > TEXT_LIMIT:
            cursor.skip(length)
            return PassedOver(f"a text of {length} bytes")
        # What a person wrote into a description need not be UTF-8; no setting that is used here has such letters.
        return cursor.take(length).decode(errors="replace")
    if kind == _ARRAY:
        return _pass_array(cursor)
    raise cursor.error(f"expected a type of value from 0 to 12; found {kind}")


def _pass_array(cursor: _Cursor) -> PassedOver:
    kind, count = cursor.number("<I"), cursor.number("<Q")
    if kind in SCALARS:
        cursor.skip(count * SCALARS[kind].size)
    elif kind == _STRING:
        cursor.skip_texts(count)
    else:
        # ggml reads no arrays of arrays either.
        raise cursor.error(f"expected an array of numbers or texts; found one of the type {kind}")
    return PassedOver(f"an array of {count}")


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    """Tensors follow each other without holes, each from a multiple of the alignment on."""
    tensors: dict[str, TensorInfo] = {}
    end = 0
    for _ in range(count):
        name = cursor.text("the name of a tensor")
        if name in tensors:
            raise cursor.error(f"expected each tensor once; found {brief(name)} again")
        tensors[name], offset = _tensor(cursor, name)
        begin = -(-end // alignment) * alignment
        if offset != begin:
            raise cursor.error(f"expected the tensor {brief(name)} at offset {begin}; found {offset}")
        end = begin + tensors[name].size
    data = -(-cursor.at // alignment) * alignment
    if tensors and cursor.source.size is not None and data + end > cursor.source.size:
        raise truncated(cursor.source, data + end)
    return tensors


def _tensor(cursor: _Cursor, name: str) -> tuple[TensorInfo, int]:
    """A tensor, and the offset of its data."""
    dimensions = cursor.number("<I")
    if not 1 <= dimensions <= DIMENSIONS_LIMIT:
        raise cursor.error(
            f"expected 1 to {DIMENSIONS_LIMIT} dimensions of the tensor {brief(name)}; found {dimensions}"
        )
    widths = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions))
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    if kind not in TENSOR_TYPES:
        known = [f"{number} {label}" for number, (label, _, _) in TENSOR_TYPES.items()]
        raise cursor.error(f"the tensor {brief(name)} has an {unknown_name('type', str(kind), known)}")
    label, block, block_bytes = TENSOR_TYPES[kind]
    if widths[0] % block:
        raise cursor.error(
            f"expected rows of the tensor {brief(name)} in blocks of {block} for {label}; found {widths[0]}"
        )
    return TensorInfo(widths[::-1], label, math.prod(widths) // block * block_bytes), offset
