"""Headers of GGUF files, good and hostile."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import BaseModelError
from profiles.byte_source import ByteSource, local_file
from profiles.gguf_header import FIRST_WINDOW, GgufHeader, PassedOver, gguf_header
from profiles.packaged import packaged_file
from tests.profiles.model_files import gguf_bytes, pair, text, tiny_gguf

WHOLE = tiny_gguf()


def in_memory(content: bytes, size: int | None = -1) -> ByteSource:
    return ByteSource("model.gguf", len(content) if size == -1 else size, lambda at, count: content[at : at + count])


def refused(content: bytes) -> str:
    with pytest.raises(BaseModelError) as caught:
        gguf_header(in_memory(content))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1500
    return message


def outcome(content: bytes) -> GgufHeader | str:
    """The header, or the one error that there may be."""
    try:
        return gguf_header(in_memory(content))
    except BaseModelError as error:
        return str(error)


@pytest.mark.parametrize("version", [2, 3])
def test_settings_and_shapes_come_out_and_the_tokenizer_stays(version: int) -> None:
    settings = {"general.architecture": "llama", "a.count": 7, "a.on": True, "a.eps": 0.5, "list": [1, 2, 3]}
    content = gguf_bytes({**settings, "long": "x" * 5000}, {"one.weight": (3, 8), "two.weight": (5,)}, version)

    header = gguf_header(in_memory(content))

    assert header.metadata == {
        **settings,
        "list": PassedOver("an array of 3"),
        "long": PassedOver("a text of 5000 bytes"),
    }
    assert {name: tensor.shape for name, tensor in header.tensors.items()} == {
        "one.weight": (3, 8),
        "two.weight": (5,),
    }
    assert [tensor.size for tensor in header.tensors.values()] == [96, 20]


@pytest.mark.model
def test_a_real_file_reads_as_the_reference_library_reads_it() -> None:
    gguf = pytest.importorskip("gguf")
    path = packaged_file("smollm2")
    header = gguf_header(local_file(path))
    reference = gguf.GGUFReader(path)

    assert {name: (tensor.shape, tensor.size) for name, tensor in header.tensors.items()} == {
        tensor.name: (tuple(reversed(tensor.shape.tolist())), int(tensor.n_bytes)) for tensor in reference.tensors
    }
    assert header.metadata["llama.embedding_length"] == 576
    assert header.metadata["tokenizer.ggml.tokens"] == PassedOver("an array of 49152")


@pytest.mark.parametrize("window", [64, 1000, FIRST_WINDOW])
def test_windows_do_not_show_in_the_result(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr("profiles.gguf_header.LAST_WINDOW", window)
    source = in_memory(WHOLE)
    cut = ByteSource("model.gguf", None, source.read)

    assert gguf_header(cut) == gguf_header(source)


@given(st.integers(0, len(WHOLE) - 1))
def test_a_file_cut_short_anywhere_is_one_line(length: int) -> None:
    refused(WHOLE[:length])


@given(st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_give_a_header_or_one_line(flips: list[tuple[int, int]]) -> None:
    content = bytearray(WHOLE)
    for at, value in flips:
        content[at] = value
    tracemalloc.start()
    found = outcome(bytes(content))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert isinstance(found, GgufHeader) or "\n" not in found
    assert peak < 8 << 20


HUGE = 2**60
HOSTILE = {
    "a text of 2^60 bytes": (0, 1, text("k") + struct.pack("<IQ", 8, HUGE)),
    "a key of 2^60 bytes": (0, 1, struct.pack("<Q", HUGE)),
    "2^60 texts": (0, 1, text("k") + struct.pack("<IIQ", 9, 8, HUGE)),
    "2^60 numbers": (0, 1, text("k") + struct.pack("<IIQ", 9, 4, HUGE)),
    "an array of arrays": (0, 1, text("k") + struct.pack("<IIQ", 9, 9, HUGE)),
    "2^60 settings": (0, HUGE, b""),
    "2^60 tensors": (HUGE, 0, b""),
    "2^31 dimensions": (1, 0, text("t") + struct.pack("<I", 2**31)),
    "no dimensions": (1, 0, text("t") + struct.pack("<I", 0)),
    "2^60 elements": (1, 0, text("t") + struct.pack("<IQIQ", 1, HUGE, 0, 0)),
    "an unknown type of tensor": (1, 0, text("t") + struct.pack("<IQIQ", 1, 4, 4, 0)),
    "half a block": (1, 0, text("t") + struct.pack("<IQIQ", 1, 16, 8, 0)),
    "an offset out of line": (1, 0, text("t") + struct.pack("<IQIQ", 1, 4, 0, 64)),
    "an unknown type of value": (0, 1, text("k") + struct.pack("<I", 13)),
    "a setting twice": (0, 2, pair("k", 1) + pair("k", 2)),
    "a tensor twice": (2, 0, b"".join(text("t") + struct.pack("<IQIQ", 1, 8, 0, at) for at in (0, 32))),
    "a key of 5000 bytes": (0, 1, text("k" * 5000) + struct.pack("<II", 4, 1)),
    "a key that is no text": (0, 1, struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 1)),
    "an alignment of 3": (0, 1, pair("general.alignment", 3)),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("sized", [True, False])
def test_a_hostile_header_fails_at_once_and_allocates_nothing(name: str, sized: bool) -> None:
    tensors, settings, rest = HOSTILE[name]
    content = b"GGUF" + struct.pack("<IQQ", 3, tensors, settings) + rest + bytes(200)
    tracemalloc.start()
    with pytest.raises(BaseModelError) as caught:
        # A server need not say how long the file is. Only the size can then tell that data are missing.
        gguf_header(in_memory(content, -1 if sized or name == "2^60 elements" else None))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert "\n" not in str(caught.value)
    assert peak < 1 << 20


def test_a_sparse_file_cannot_make_the_reader_walk_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profiles.gguf_header.HEADER_LIMIT", 2 << 20)
    path = tmp_path / "sparse.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 1 << 18))
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    with pytest.raises(BaseModelError, match="at most"):
        gguf_header(local_file(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 32 << 20


def test_other_versions_byte_orders_and_formats_are_named() -> None:
    assert "big-endian" in refused(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    assert "version 2 or 3; found 1" in refused(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    assert "begin with" in refused(b"PK\x03\x04" + bytes(40))
    assert "fetch it again" in refused(b"")


def test_no_more_than_the_header_is_read() -> None:
    content = gguf_bytes({"k": 1}, {"big.weight": (3000, 3000)})
    reads: list[int] = []

    def read(at: int, count: int) -> bytes:
        reads.append(at + count)
        return content[at : at + count]

    gguf_header(ByteSource("model.gguf", len(content), read))

    assert max(reads) <= FIRST_WINDOW < len(content) // 100
