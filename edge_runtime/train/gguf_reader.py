"""The parts of a GGUF file: settings as plain values, and where each tensor's bytes are.

gguf-py's own reader keeps two array objects for every token and every merge, 175 MiB for a vocabulary of 49,152; this
one keeps the values. Its table of block types and its dequantisation are used.

Source of the format: ggml's `docs/gguf.md`, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edge_runtime.errors import missing_extra

try:
    import gguf
    import numpy as np
    from gguf.quants import quant_shape_to_byte_shape
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "gguf", "client") from missing

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Type of a value → struct's letter.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Block types that are plain numbers; all others are rows of bytes.
_NUMBERS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


@dataclass(frozen=True)
class Stored:
    """One tensor in the file.

    Attributes:
        offset: of its first byte in the file.
        layout: shape as it is stored, in items of `number`.
        number: numpy's type of an item; uint8 where rows are blocks of quantised weights.
        block_type: of gguf-py.
        shape: in torch's order.
    """

    offset: int
    layout: tuple[int, ...]
    number: Any
    block_type: Any
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GgufParts:
    """What a file holds: settings by key (text, numbers, lists), and tensors by the file's names, in its order."""

    settings: Mapping[str, Any]
    tensors: Mapping[str, Stored]


def read_parts(path: Path) -> GgufParts:
    """Everything before the weights, which are not read.

    Raises:
        ValueError: no GGUF, another version or byte order, a file that ends too early, or an unknown type.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        reading = _Reading(file, path.stat().st_size)
        if reading.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = reading.number("I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version} is not one of {_VERSIONS}, little-endian")
        tensors, settings = reading.number("Q"), reading.number("Q")
        values: dict[str, Any] = {}
        for _ in range(settings):
            key = reading.text()
            values[key] = reading.value(reading.number("I"))
        found = [
            (reading.text(), reading.dimensions(), reading.number("I"), reading.number("Q")) for _ in range(tensors)
        ]
        alignment = int(values.get("general.alignment", 32))
        if alignment < 1:
            raise ValueError(f"an alignment of {alignment} bytes")
        start = math.ceil(file.tell() / alignment) * alignment
        return GgufParts(values, {name: reading.stored(start + offset, *rest) for name, *rest, offset in found})


@dataclass(frozen=True)
class _Reading:
    """A file that is read forwards; every length is checked against what is left of it."""

    file: BinaryIO
    size: int

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise ValueError(f"it ends after {self.size} bytes, {count} more are announced at {self.file.tell()}")
        return self.file.read(count)

    def number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def dimensions(self) -> tuple[int, ...]:
        count = self.number("I")
        return tuple(reversed(struct.unpack(f"<{count}Q", self.take(8 * count))))

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"a value of unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            items = np.dtype(f"<{_SCALARS[kind]}")
            return np.frombuffer(self.take(items.itemsize * count), items).tolist()
        if kind != _STRING:
            raise ValueError(f"a list of values of type {kind}")
        return [self.text() for _ in range(count)]

    def stored(self, offset: int, shape: tuple[int, ...], kind: int) -> Stored:
        if not shape:
            raise ValueError("a tensor without dimensions")
        block_type = gguf.GGMLQuantizationType(kind)
        number = np.dtype(_NUMBERS.get(block_type.name, np.uint8))
        layout = shape if block_type.name in _NUMBERS else tuple(quant_shape_to_byte_shape(shape, block_type))
        end = offset + math.prod(layout) * number.itemsize
        if end > self.size:
            raise ValueError(f"it ends after {self.size} bytes, and a tensor ends at {end}")
        return Stored(offset, layout, number, block_type, shape)
