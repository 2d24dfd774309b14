"""llama.cpp computes from an exported adapter what the live model computes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

from edge_runtime.errors import ExportError, MissingExtraError
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.train.base import PreparedBase, prepare
from edge_runtime.train.gguf_reader import read_parts
from export import gguf
from export.subject import Subject
from tests.export.architectures import (
    ARCHITECTURES,
    log_probabilities,
    prepared_base,
    uneven_adapter,
    write_base,
)
from tests.export.subjects import PROMPT, SCALING, Live, family_adapter, live

pytestmark = pytest.mark.torch
Prepare = Callable[..., PreparedBase]


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Prepare:
    """Prepares a tiny base: `base("qwen2", precision=…, **settings)`."""
    return lambda model_type, **settings: prepared_base(tmp_path / "base", tiny_base, model_type, **settings)


def exported(found: Live, folder: Path) -> Path:
    folder.mkdir()
    gguf.refuse(found.subject)
    gguf.write(found.subject, folder)
    return folder


def distance(found: Live, folder: Path) -> float:
    """Largest difference of a logarithm of a probability between llama.cpp and the live model."""
    engine: Any = gguf.open_engine(found.subject, folder)
    said = engine.log_probabilities(PROMPT, found.logits.shape[1])
    engine.close()
    return float(np.abs(said - log_probabilities(found.logits)).max())


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_llama_cpp_computes_what_the_live_model_computes(base: Prepare, tmp_path: Path, model_type: str) -> None:
    """Every kind of layer, ranks that differ by layer, biases, grouped heads."""
    pytest.importorskip("xllamacpp")
    prepared = base(model_type)
    found = live(prepared, uneven_adapter(prepared))
    folder = exported(found, tmp_path / "out")

    assert np.abs(found.logits - found.plain).max() > 0.3
    assert distance(found, folder) < 1e-3
    engine = gguf.open_engine(found.subject, folder)
    assert engine.greedy(PROMPT, 8) == found.greedy
    with pytest.raises(ExportError, match="no logits"):
        engine.logits(PROMPT)
    engine.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_rows_in_another_order_do_not_agree(base: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the comparison is there to find: it loads, and answers otherwise."""
    pytest.importorskip("xllamacpp")
    prepared = base("llama")
    found = live(prepared, uneven_adapter(prepared))
    monkeypatch.setattr(gguf, "pairs", lambda weight, _heads: weight)

    assert distance(found, exported(found, tmp_path / "out")) > 1e-2


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
def test_it_is_verified_on_the_weights_that_the_live_model_has(base: Prepare, tmp_path: Path, precision: str) -> None:
    pytest.importorskip("xllamacpp")
    prepared = base("llama", precision=precision)
    subject = Subject(uneven_adapter(prepared), SCALING, "base", prepared)
    from export import native  # noqa: PLC0415 - of this test alone

    (tmp_path / "native").mkdir()
    native.write(subject, tmp_path / "native")
    within = native.open_engine(subject, tmp_path / "native")
    found = Live(subject, within.logits(PROMPT), within.logits(PROMPT), within.greedy(PROMPT, 8))

    assert distance(found, exported(found, tmp_path / "out")) < 1e-3


def test_every_tensor_has_its_own_change_under_the_one_alpha(base: Prepare, tmp_path: Path) -> None:
    """llama.cpp multiplies by alpha / rank, the rank being that of the tensor."""
    prepared = base("qwen2")
    adapter = uneven_adapter(prepared)
    gguf.write(Subject(adapter, SCALING, "org/base", prepared), tmp_path)
    parts = read_parts(tmp_path / gguf.ADAPTER)
    alpha = parts.settings["adapter.lora.alpha"]
    filled = {name: pair for name, pair in adapter.items() if pair.rank}

    assert parts.settings["general.type"] == "adapter"
    assert parts.settings["adapter.type"] == "lora"
    assert parts.settings["general.architecture"] == "qwen2"
    assert len(parts.tensors) == 2 * len(filled)
    for ours, theirs in (("self_attn.q_proj", "attn_q"), ("mlp.down_proj", "ffn_down")):
        pair = adapter[f"model.layers.1.{ours}"]
        b = parts.tensors[f"blk.1.{theirs}.weight.lora_b"]
        stored = np.memmap(tmp_path / gguf.ADAPTER, np.float32, "r", b.offset, b.shape)
        np.testing.assert_allclose(stored * np.float32(alpha / pair.rank), pair.b, rtol=1e-6)


def test_ranks_that_are_all_alike_leave_bit_for_bit(base: Prepare, tmp_path: Path) -> None:
    prepared = base("qwen2")
    pair = Pair(np.full((3, 64), 0.1, np.float32), np.full((64, 3), 0.7, np.float32))
    gguf.write(Subject(Adapter({"model.layers.0.self_attn.q_proj": pair}), SCALING, "base", prepared), tmp_path)
    stored = read_parts(tmp_path / gguf.ADAPTER).tensors["blk.0.attn_q.weight.lora_b"]

    found = np.memmap(tmp_path / gguf.ADAPTER, np.float32, "r", stored.offset, stored.shape)
    np.testing.assert_array_equal(found, pair.b)


@pytest.mark.parametrize(
    ("base_name", "file"),
    [
        ("smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("org/Base-1B", "Base-1B.gguf"),
        ("models/base.Q8_0.gguf", "base.Q8_0.gguf"),
    ],
)
def test_the_modelfile_names_base_and_adapter(base: Prepare, tmp_path: Path, base_name: str, file: str) -> None:
    prepared = base("llama")
    gguf.write(Subject(uneven_adapter(prepared), SCALING, base_name, prepared), tmp_path)
    said = (tmp_path / gguf.MODELFILE).read_text(encoding="utf-8").splitlines()

    assert f"FROM ./{file}" in said
    assert "ADAPTER ./adapter.gguf" in said
    assert base_name in said[0]


@pytest.mark.parametrize("family", ["dora", "ia3", "prompt"])
def test_families_that_are_more_than_pairs_are_refused(base: Prepare, tiny_base: Path, family: str) -> None:
    subject = Subject(family_adapter(tiny_base, family), SCALING, "base", base("llama"), family)
    with pytest.raises(ExportError, match=f"family '{family}'.*as native"):
        gguf.refuse(subject)


@pytest.mark.parametrize("layer", ["lm_head", "model.embed_tokens", "model.layers.0.mlp.router", "h.0.attn.c_attn"])
def test_layers_without_a_place_in_gguf_are_refused_by_name(base: Prepare, tmp_path: Path, layer: str) -> None:
    pair = Pair(np.ones((2, 64), np.float32), np.ones((520, 2), np.float32))
    subject = Subject(Adapter({layer: pair}), SCALING, "base", base("llama"))
    with pytest.raises(ExportError, match=f"'{layer}'.*self_attn.q_proj"):
        gguf.refuse(subject)
    with pytest.raises(ExportError, match=layer):
        gguf.write(subject, tmp_path / "nowhere")


def test_architectures_subjects_and_bases_that_do_not_do_are_refused(
    base: Prepare, tiny_base: Path, tmp_path: Path
) -> None:
    prepared = base("llama")
    other = prepare(str(write_base(tmp_path / "m", tiny_base, "mistral")), precision="fp32", cache=tmp_path / "c")
    subject = Subject(uneven_adapter(prepared), SCALING, "base", prepared)

    with pytest.raises(ExportError, match=r"'mistral'.*llama, qwen2, qwen3.*as merged"):
        gguf.refuse(replace(subject, prepared=other))
    with pytest.raises(ExportError, match="--base"):
        gguf.refuse(replace(subject, prepared=None))
    with pytest.raises(ExportError, match="at least one direction"):
        gguf.refuse(replace(subject, adapter=Adapter({})))
    with pytest.raises(ExportError, match="cannot write"):
        gguf.write(subject, tmp_path / "absent")


def test_a_file_that_llama_cpp_does_not_accept_is_an_export_error(base: Prepare, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    prepared = base("llama")
    subject = Subject(uneven_adapter(prepared), SCALING, "base", prepared)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / gguf.ADAPTER).write_bytes(b"GGUF nonsense")

    with pytest.raises(ExportError, match=r"expected llama\.cpp to open"):
        gguf.open_engine(subject, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_without_llama_cpp_the_error_says_what_to_install(
    base: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = base("llama")
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    monkeypatch.delitem(sys.modules, "export.llama_cpp", raising=False)
    with pytest.raises(MissingExtraError, match=r"xllamacpp.*edge-runtime\[verify\]"):
        gguf.open_engine(Subject(uneven_adapter(prepared), SCALING, "base", prepared), tmp_path)


def test_what_ends_an_answer_does_not_end_the_comparison(tiny_base: Path, tmp_path: Path) -> None:
    """The live model goes on after its end-of-sequence token, and llama.cpp must too."""
    pytest.importorskip("xllamacpp")
    source = write_base(tmp_path / "source", tiny_base, "llama")
    whole = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    names = {number: token for token, number in whole["model"]["vocab"].items()}
    plain = prepare(str(source), precision="fp32", cache=tmp_path / "plain")
    adapter = uneven_adapter(plain)
    expected = live(plain, adapter).greedy
    ends = next(place for place, token in enumerate(expected) if token in names)
    about = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    (source / "tokenizer_config.json").write_text(json.dumps(about | {"eos_token": names[expected[ends]]}))
    ending = live(prepare(str(source), precision="fp32", cache=tmp_path / "ending"), adapter)
    engine = gguf.open_engine(ending.subject, exported(ending, tmp_path / "out"))

    assert engine.greedy(PROMPT, 8) == expected
    engine.close()


def test_more_tokens_than_there_is_room_for_are_an_export_error(base: Prepare, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    prepared = base("llama")
    found = live(prepared, uneven_adapter(prepared))
    engine = gguf.open_engine(found.subject, exported(found, tmp_path / "out"))
    with pytest.raises(ExportError, match="context"):
        engine.greedy([5] * 5000, 1)
    engine.close()
