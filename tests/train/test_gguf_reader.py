"""The parts of a GGUF file are those that gguf-py reads, and a file cut anywhere is an error, not a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.torch
gguf = pytest.importorskip("gguf")
gguf_reader = pytest.importorskip("edge_runtime.train.gguf_reader")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file with every kind of setting and three kinds of tensor."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("a.text", "π, and more")
    writer.add_uint32("a.count", 7)
    writer.add_int64("a.sum", -(1 << 40))
    writer.add_float32("a.share", 0.25)
    writer.add_bool("a.flag", True)
    writer.add_array("a.texts", ["one", "", "drei"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.shares", [0.5, 1.5])
    values = np.linspace(-1, 1, 96 * 64, dtype=np.float32).reshape(96, 64)
    writer.add_tensor(
        "wide", gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("norm", values[0])
    writer.add_tensor("half", values[:3].astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_settings_and_tensors_are_those_of_the_reference_reader(written: Path) -> None:
    reference = gguf.GGUFReader(written)

    found = gguf_reader.read_parts(written)

    expected = {key: field.contents() for key, field in reference.fields.items() if not key.startswith("GGUF.")}
    assert found.settings == expected
    assert list(found.tensors) == ["wide", "norm", "half"]
    for tensor in reference.tensors:
        ours = found.tensors[tensor.name]
        assert (ours.offset, ours.layout, ours.number) == (tensor.data_offset, tensor.data.shape, tensor.data.dtype)
        assert (ours.block_type, ours.shape) == (tensor.tensor_type, tuple(reversed(tensor.shape.tolist())))


def test_a_file_cut_anywhere_is_refused(written: Path, tmp_path: Path) -> None:
    content, torn = written.read_bytes(), tmp_path / "torn.gguf"
    end = max(tensor.data_offset + tensor.n_bytes for tensor in gguf.GGUFReader(written).tensors)
    for length in (*range(0, 1000, 7), end - 1):
        torn.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"ends after|does not begin"):
            gguf_reader.read_parts(torn)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"GGML", "does not begin with GGUF"),
        (4, (1).to_bytes(4, "little"), "version 1 is not one of"),
        (4, (3).to_bytes(4, "big"), "little-endian"),
        (16, (1 << 60).to_bytes(8, "little"), "unknown type|ends after"),
    ],
)
def test_another_format_is_refused(written: Path, tmp_path: Path, at: int, value: bytes, message: str) -> None:
    content = bytearray(written.read_bytes())
    content[at : at + len(value)] = value
    other = tmp_path / "other.gguf"
    other.write_bytes(content)

    with pytest.raises(ValueError, match=message):
        gguf_reader.read_parts(other)
