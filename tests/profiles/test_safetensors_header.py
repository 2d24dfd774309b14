"""Headers of safetensors files, good and hostile."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from edge_runtime.errors import BaseModelError
from profiles.byte_source import ByteSource, local_file
from profiles.safetensors_header import HEADER_LIMIT, safetensors_header
from profiles.tensors import TensorInfo
from tests.profiles.model_files import framed, safetensors_bytes

WHOLE = safetensors_bytes({"a.weight": (4, 6), "b.weight": (7,), "c.weight": ()}, {"b.weight": "F32"})
ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def in_memory(content: bytes, *, sized: bool = True) -> ByteSource:
    return ByteSource("model.safetensors", len(content) if sized else None, lambda at, count: content[at : at + count])


def refused(content: bytes) -> str:
    with pytest.raises(BaseModelError) as caught:
        safetensors_header(in_memory(content))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


def outcome(content: bytes) -> dict[str, TensorInfo] | str:
    """The header, or the one error that there may be."""
    try:
        return safetensors_header(in_memory(content))
    except BaseModelError as error:
        return str(error)


def test_a_file_of_the_reference_library_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros((2, 3), np.float32), "b": np.zeros((0, 5), np.int8), "c": np.zeros((), np.float16)}, path)

    assert safetensors_header(local_file(path)) == {
        "a": TensorInfo((2, 3), "fp32", 24),
        "b": TensorInfo((0, 5), "int8", 0),
        "c": TensorInfo((), "fp16", 2),
    }


def test_only_the_length_and_the_header_are_read() -> None:
    reads: list[tuple[int, int]] = []

    def read(at: int, count: int) -> bytes:
        reads.append((at, count))
        return WHOLE[at : at + count]

    safetensors_header(ByteSource("model.safetensors", len(WHOLE), read))

    (length,) = struct.unpack("<Q", WHOLE[:8])
    assert reads == [(0, 8), (8, length)]


@given(st.integers(0, len(WHOLE) - 1))
def test_a_file_cut_short_anywhere_is_one_line(length: int) -> None:
    assert "fetch it again" in refused(WHOLE[:length])


def test_a_file_with_bytes_after_its_data_is_refused() -> None:
    assert f"have {len(WHOLE)} bytes" in refused(WHOLE + b"x")


@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_give_a_header_or_one_line(flips: list[tuple[int, int]]) -> None:
    content = bytearray(WHOLE)
    for at, value in flips:
        content[at] = value
    found = outcome(bytes(content))

    assert isinstance(found, dict) or "\n" not in found


@pytest.mark.parametrize("length", [0, 1, HEADER_LIMIT + 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("sized", [True, False])
def test_a_length_that_cannot_be_is_refused_before_it_is_read(length: int, sized: bool) -> None:
    with pytest.raises(BaseModelError, match=r"fetch it again"):
        safetensors_header(in_memory(struct.pack("<Q", length) + WHOLE[8:], sized=sized))


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"{]", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 200_000, "nested"),
        (b"[1]", "JSON object"),
        (b'{"a": 1, "a": 2}', "twice"),
        ({"a": 3}, "an object"),
        ({"a": {}}, "dtype"),
        ({"a": {**ENTRY, "dtype": ["U8"]}}, "dtype"),
        ({"a": {**ENTRY, "dtype": "Q4"}}, "dtype"),
        ({"a": {**ENTRY, "shape": [-4]}}, "list of sizes"),
        ({"a": {**ENTRY, "shape": [True] * 4}}, "list of sizes"),
        ({"a": {**ENTRY, "shape": [1] * 1000}}, "list of sizes"),
        ({"a": {**ENTRY, "shape": [5]}}, "5 bytes"),
        ({"a": {**ENTRY, "data_offsets": [4, 0]}}, "begin and an end"),
        ({"a": {**ENTRY, "data_offsets": [0]}}, "begin and an end"),
        ({"a": {**ENTRY, "data_offsets": [1, 5]}}, "data from 0 on"),
        ({"a": ENTRY, "b": ENTRY}, "data from 4 on"),
    ],
)
def test_a_header_that_cannot_be_is_named(header: object, said: str) -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()

    assert said in refused(framed(content, bytes(4)))
