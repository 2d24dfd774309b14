"""A merged model in GGUF computes what the live model computes, and speaks with the same tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

import torch
import transformers

from edge_runtime.errors import ExportError
from edge_runtime.train.base import PreparedBase, prepare
from edge_runtime.train.checkpoint import Checkpoint, open_folder
from edge_runtime.train.gguf_file import open_gguf
from edge_runtime.train.gguf_names import USER_DEFINED
from edge_runtime.train.gguf_reader import read_parts
from export import gguf_merged, gguf_model, gguf_tokenizer
from export.merging import merged
from export.subject import Subject
from profiles.packaged import packaged_file
from tests.export.architectures import ARCHITECTURES, log_probabilities, prepared_base, uneven_adapter
from tests.export.subjects import PROMPT, SCALING, family_adapter, live

pytestmark = pytest.mark.torch
Prepare = Callable[..., PreparedBase]
Change = Callable[[dict[str, Any]], None]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Prepare:
    """Prepares a tiny base: `base("qwen2", precision=…, **settings)`."""
    return lambda model_type, **settings: prepared_base(tmp_path / "base", tiny_base, model_type, **settings)


def distance(path: Path, logits: Any, prompt: Sequence[int] = PROMPT) -> float:
    """Largest difference of a logarithm of a probability between a GGUF model in llama.cpp and logits."""
    llama = pytest.importorskip("export.llama_cpp")
    engine = llama.open_llama(path)
    said = engine.log_probabilities(prompt, logits.shape[1])
    engine.close()
    return float(np.abs(said - log_probabilities(logits)).max())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_llama_cpp_computes_what_the_live_model_computes(
    base: Prepare, tmp_path: Path, model_type: str, tied: bool
) -> None:
    """In float32 up to rounding; in float16, as it is exported, up to that of the weights."""
    pytest.importorskip("xllamacpp")
    prepared = base(model_type, tie_word_embeddings=tied)
    found = live(prepared, uneven_adapter(prepared))
    gguf_merged.refuse(found.subject)
    gguf_merged.write(found.subject, tmp_path)
    gguf_model.write_model(merged(found.subject), tmp_path / "wide.gguf", label="wide", block_type="F32")

    assert np.abs(found.logits - found.plain).max() > 0.3
    assert distance(tmp_path / "wide.gguf", found.logits) < 1e-3
    assert distance(tmp_path / gguf_merged.MODEL, found.logits) < 0.05
    engine = gguf_merged.open_engine(found.subject, tmp_path)
    assert engine.greedy(PROMPT, 8) == found.greedy
    engine.close()
    assert (tmp_path / gguf_merged.MODELFILE).read_text(encoding="utf-8") == "FROM ./model.gguf\n"


@pytest.mark.parametrize("family", ["bitfit", "dora", "ia3", "layer_norm"])
def test_whatever_can_be_merged_can_be_written(base: Prepare, tiny_base: Path, tmp_path: Path, family: str) -> None:
    pytest.importorskip("xllamacpp")
    prepared = prepare(str(tiny_base), precision="fp32", cache=tmp_path / "cache")
    found = live(prepared, family_adapter(tiny_base, family), family)
    gguf_model.write_model(merged(found.subject), tmp_path / "m.gguf", label="m", block_type="F32")

    assert np.abs(found.logits - found.plain).max() > 0.01
    assert distance(tmp_path / "m.gguf", found.logits) < 1e-3


def test_scaled_rotary_embeddings_of_llama_3_are_carried_over(base: Prepare, tmp_path: Path) -> None:
    """Over positions beyond those that the base was trained for, where the scaling matters."""
    prompt = tuple(3 + 7 * index % 500 for index in range(40))
    prepared = base("llama", rope_scaling=LLAMA3)
    subject = Subject(uneven_adapter(prepared), SCALING, "base", prepared)
    merged_folder = tmp_path / "merged"
    merged_folder.mkdir()
    from export import merged as merged_format  # noqa: PLC0415 - the reference of this test alone

    merged_format.write(subject, merged_folder, weights="fp32")
    expected = merged_format.open_engine(subject, merged_folder).logits(prompt)
    checkpoint = merged(subject)
    gguf_model.write_model(checkpoint, tmp_path / "m.gguf", label="m", block_type="F32")
    plain = replace(checkpoint, config={**checkpoint.config, "rope_scaling": None, "rope_parameters": None})
    gguf_model.write_model(plain, tmp_path / "plain.gguf", label="m", block_type="F32")

    assert distance(tmp_path / "m.gguf", expected, prompt) < 1e-3
    assert distance(tmp_path / "plain.gguf", expected, prompt) > 0.05


def test_the_file_reads_back_as_the_merged_model(base: Prepare, tmp_path: Path) -> None:
    prepared = base("llama", tie_word_embeddings=False)
    checkpoint = merged(Subject(uneven_adapter(prepared), SCALING, "base", prepared))
    gguf_model.write_model(checkpoint, tmp_path / "m.gguf", label="A name", block_type="F16")
    found = open_gguf(tmp_path / "m.gguf")

    assert set(found.names) == set(checkpoint.names)
    for name in found.names:
        expected = checkpoint.read(name).float()
        rounded = expected.half().float() if expected.dim() == 2 else expected
        assert torch.equal(found.read(name), rounded), name
    for key in ("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "vocab_size", "tie_word_embeddings"):
        assert found.config[key] == checkpoint.config[key]
    assert read_parts(tmp_path / "m.gguf").settings["general.name"] == "A name"


def test_the_tokenizer_reads_back_and_cuts_text_alike(base: Prepare, tmp_path: Path) -> None:
    prepared = base("qwen2")
    gguf_model.write_model(open_folder(prepared.folder), tmp_path / "m.gguf", label="m", block_type="F16")
    read = tmp_path / "read"
    read.mkdir()
    open_gguf(tmp_path / "m.gguf").write_companions(read)
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(path) for path in (read, prepared.folder))
    settings = read_parts(tmp_path / "m.gguf").settings

    for text in ("def f(a, b=12): pass", "<|im_start|>user\nÄpfel 🍎<|im_end|>", "  \n\t x"):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == (theirs.bos_token, theirs.eos_token, theirs.pad_token)
    assert ours.chat_template == theirs.chat_template
    assert settings["tokenizer.ggml.tokens"][512:] == [f"[PAD{number}]" for number in range(512, 520)]
    assert settings["tokenizer.ggml.add_bos_token"] is False


def test_llama_cpp_cuts_text_as_the_base_does(base: Prepare, tmp_path: Path) -> None:
    """The name of the cut is right: llama.cpp's own tokenizer, not ours, turns the text into tokens."""
    llama = pytest.importorskip("export.llama_cpp")
    prepared = base("llama")
    gguf_model.write_model(open_folder(prepared.folder), tmp_path / "m.gguf", label="m", block_type="F16")
    tokenizer = transformers.AutoTokenizer.from_pretrained(prepared.folder)
    engine = llama.open_llama(tmp_path / "m.gguf")

    for text in ("def f(a, b=12): return a's", "<|im_start|>user\nÄpfel 🍎<|im_end|>", "  \n\t x 2024"):
        assert engine.tokens_of(text) == tokenizer.encode(text, add_special_tokens=False)
    engine.close()


@pytest.mark.model
def test_the_tokenizer_of_the_demos_base_leaves_as_its_makers_wrote_it(tmp_path: Path) -> None:
    """It was read from GGUF, written as a Hugging Face folder, and comes back field by field."""
    path = packaged_file("smollm2")
    original = read_parts(path).settings
    gguf_model.write_model(_without_blocks(open_gguf(path)), tmp_path / "m.gguf", label="m", block_type="F16")
    found = read_parts(tmp_path / "m.gguf").settings

    compared = [key for key in original if not key.startswith("general.") and key != "tokenizer.ggml.add_space_prefix"]
    assert len(compared) > 15
    for key in compared:
        assert found[key] == original[key], key


def _without_blocks(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, names=("model.norm.weight",))


def _companions(prepared: PreparedBase, folder: Path, change: Change) -> Checkpoint:
    """The base, with something changed in its tokenizer.json."""
    shutil.copytree(prepared.folder, folder)
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(whole)
    (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    return open_folder(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda whole: whole["model"].update(type="Unigram"), "found Unigram"),
        (lambda whole: whole["model"].update(byte_fallback=True), "bytes as a fallback"),
        (lambda whole: whole.update(pre_tokenizer={"type": "Whitespace"}), "none of gpt-2, smollm"),
    ],
)
def test_tokenizers_without_a_name_in_gguf_are_refused(
    base: Prepare, tmp_path: Path, change: Change, said: str
) -> None:
    with pytest.raises(ExportError, match=f"{said}.*as merged"):
        gguf_model.check(_companions(base("llama"), tmp_path / "changed", change))


def test_a_beginning_of_sequence_and_tokens_of_a_users_own_are_carried_over(base: Prepare, tmp_path: Path) -> None:
    def change(whole: dict[str, Any]) -> None:
        whole["added_tokens"].append(
            {"id": 512, "content": "<own>", "special": False, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        )
        whole["post_processor"] = {
            "type": "Sequence",
            "processors": [
                {"type": "ByteLevel"},
                {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}]},
            ],
        }

    found = gguf_model.check(_companions(base("llama"), tmp_path / "changed", change))
    assert found.add_bos
    assert found.tokens[512] == "<own>"
    assert found.types[512] == USER_DEFINED


def test_models_that_gguf_cannot_hold_are_refused_by_name(base: Prepare, tmp_path: Path) -> None:
    checkpoint = open_folder(base("qwen2").folder)
    config = checkpoint.config

    for changed, said in (
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": None}, "'yarn'"),
        ({"rope_scaling": LLAMA3, "rope_parameters": None}, "'llama3'"),
        ({"use_sliding_window": True}, "sliding window"),
        ({"model_type": "gpt2"}, "'gpt2'.*llama, qwen2, qwen3"),
    ):
        with pytest.raises(ExportError, match=said):
            gguf_model.check(replace(checkpoint, config={**config, **changed}))
    with pytest.raises(ExportError, match=r"'model\.visual\.weight'"):
        gguf_model.check(replace(checkpoint, names=(*checkpoint.names, "model.visual.weight")))
    with pytest.raises(ExportError, match=r"tokenizer\.json"):
        gguf_tokenizer.read_vocabulary(tmp_path, 512)
    with pytest.raises(ExportError, match="only 100 rows"):
        gguf_tokenizer.read_vocabulary(base("llama").folder, 100)


def test_a_weight_too_large_for_float16_is_an_export_error(base: Prepare, tmp_path: Path) -> None:
    checkpoint = open_folder(base("llama").folder)
    large = replace(checkpoint, rows=lambda name, start, stop: 1e6 * checkpoint.rows(name, start, stop))
    with pytest.raises(ExportError, match="F16"):
        gguf_model.write_model(large, tmp_path / "m.gguf", label="m", block_type="F16")


def test_a_subject_without_a_base_is_refused(base: Prepare) -> None:
    prepared = base("llama")
    with pytest.raises(ExportError, match="--base"):
        gguf_merged.refuse(Subject(uneven_adapter(prepared), SCALING, "base", None))
