"""A GGUF file comes out as the model it was made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.errors import BaseModelError
from tests.train.conftest import CHAT_TEMPLATE, SPECIAL

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
checkpoint = pytest.importorskip("edge_runtime.train.checkpoint")
gguf_file = pytest.importorskip("edge_runtime.train.gguf_file")
gguf_names = pytest.importorskip("edge_runtime.train.gguf_names")
convert = pytest.importorskip("edge_runtime.train.convert")
source = pytest.importorskip("edge_runtime.train.source")

NAMES = {"model.embed_tokens.": "token_embd.", "model.norm.": "output_norm.", "lm_head.": "output."} | {
    f".{theirs}.": f".{ours}." for ours, theirs in gguf_names.BLOCK.items()
}
HEADS = {".attn_q.": 4, ".attn_k.": 2}

WriteGguf = Callable[..., Path]


def gguf_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name.replace("model.layers.", "blk.")


def to_pairs(weight: Any, heads: int) -> Any:
    """llama.cpp's `permute`, from its converter: the rows of each head from halves to pairs."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


@pytest.fixture
def write_gguf(tiny_base: Path, tmp_path: Path) -> WriteGguf:
    """Writes the tiny base as GGUF: `write_gguf(block_type=..., architecture=..., extra_tensor=..., keys={...})`."""
    tensors = safetensors_torch.load_file(tiny_base / "model.safetensors")
    config = json.loads((tiny_base / "config.json").read_text(encoding="utf-8"))
    bpe = json.loads((tiny_base / "tokenizer.json").read_text(encoding="utf-8"))

    def write(
        *,
        block_type: str = "F32",
        architecture: str = "llama",
        extra_tensor: str | None = None,
        keys: dict[str, str] | None = None,
    ) -> Path:
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_rope_freq_base(10000.0)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        vocabulary = bpe["model"]["vocab"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
        writer.add_token_types([3 if index < len(SPECIAL) else 1 for index in range(len(vocabulary))])
        writer.add_token_merges([" ".join(merge) for merge in bpe["model"]["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(0)
        writer.add_chat_template(CHAT_TEMPLATE)
        for key, value in (keys or {}).items():
            writer.add_string(key, value)
        stored = {gguf_name(name): tensor.numpy() for name, tensor in tensors.items()}
        if extra_tensor:
            stored[extra_tensor] = np.ones(4, dtype=np.float32)
        for name, tensor in stored.items():
            heads = next((count for part, count in HEADS.items() if part in name and architecture == "llama"), None)
            data = np.ascontiguousarray(tensor if heads is None else to_pairs(tensor, heads))
            kind = gguf.GGMLQuantizationType[block_type if data.ndim == 2 else "F32"]
            writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def test_a_float_file_gives_back_every_tensor_bit_for_bit(write_gguf: WriteGguf, tiny_base: Path) -> None:
    original = safetensors_torch.load_file(tiny_base / "model.safetensors")

    found = gguf_file.open_gguf(write_gguf())

    assert set(found.names) == set(original)
    for name in found.names:
        assert torch.equal(found.read(name), original[name]), name


def test_the_base_made_from_it_speaks_like_the_original(write_gguf: WriteGguf, tiny_base: Path, tmp_path: Path) -> None:
    """Weights, configuration and tokenizer together, through transformers."""
    folder = tmp_path / "converted"
    folder.mkdir()
    convert.convert(source.resolve(str(write_gguf())), folder, "fp32")

    def read(path: Path) -> tuple[Any, Any]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "def f(a, b=12): pass"}], tokenize=False, add_generation_prompt=True
        )
        with torch.no_grad():
            ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
            return (ids.tolist(), tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token), model(ids).logits

    (found, found_logits), (expected, expected_logits) = read(folder), read(tiny_base)
    assert found == expected
    assert torch.equal(found_logits, expected_logits)


def test_block_types_are_dequantised_some_rows_at_a_time(
    write_gguf: WriteGguf, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "PIECE", 6400)
    original = safetensors_torch.load_file(tiny_base / "model.safetensors")
    eight_bit = gguf.GGMLQuantizationType.Q8_0

    found = gguf_file.open_gguf(write_gguf(block_type="Q8_0"))

    embedding = original["model.embed_tokens.weight"].numpy()
    expected = gguf.dequantize(gguf.quantize(embedding, eight_bit), eight_bit)
    assert np.array_equal(found.read("model.embed_tokens.weight").numpy(), expected)
    for name in found.names:
        assert torch.allclose(found.read(name), original[name], atol=2e-3), name


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"])
def test_any_rows_may_be_read_alone(write_gguf: WriteGguf, tiny_base: Path, name: str) -> None:
    """Also where their order in the file is another: they are gathered from both halves of a head."""
    original = safetensors_torch.load_file(tiny_base / "model.safetensors")
    weight = f"model.layers.0.{name}.weight"
    found = gguf_file.open_gguf(write_gguf())

    assert found.shape(weight) == tuple(original[weight].shape)
    assert torch.equal(found.rows(weight, 5, 23), original[weight][5:23])


def test_families_without_paired_rows_keep_their_order(write_gguf: WriteGguf, tiny_base: Path) -> None:
    found = gguf_file.open_gguf(write_gguf(architecture="qwen2"))

    original = safetensors_torch.load_file(tiny_base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(found.read(name), original[name])
    assert found.config["architectures"] == ["Qwen2ForCausalLM"]


def test_the_configuration_has_the_numbers_that_its_makers_wrote(write_gguf: WriteGguf, tiny_base: Path) -> None:
    """A float32 in the file must not become 9.999999747378752e-06 in JSON."""
    original = json.loads((tiny_base / "config.json").read_text(encoding="utf-8"))

    found = gguf_file.open_gguf(write_gguf()).config

    for key in (
        "rms_norm_eps",
        "hidden_size",
        "num_key_value_heads",
        "vocab_size",
        "tie_word_embeddings",
        "model_type",
    ):
        assert found[key] == original[key], key
    assert found["rope_theta"] == 10000.0


def test_what_cannot_be_carried_over_is_refused(write_gguf: WriteGguf, tmp_path: Path) -> None:
    """A tensor or a setting that is ignored would be a model that is silently wrong."""
    with pytest.raises(BaseModelError, match=r"unknown tensor 'rope_freqs\.weight'"):
        gguf_file.open_gguf(write_gguf(extra_tensor="rope_freqs.weight"))
    with pytest.raises(BaseModelError, match=r"without scaling of the rotary embedding; found 'yarn'"):
        gguf_file.open_gguf(write_gguf(keys={"llama.rope.scaling.type": "yarn"}))
    with pytest.raises(BaseModelError, match=r"unknown architecture 'mamba'.*llama, qwen2, qwen3"):
        gguf_file.open_gguf(write_gguf(architecture="mamba"))


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, write_gguf: WriteGguf) -> None:
    torn = tmp_path / "torn.gguf"
    for content in (b"", b"GGUF", b"nothing of the kind at all", write_gguf().read_bytes()[:5000]):
        torn.write_bytes(content)
        with pytest.raises(BaseModelError, match=r"expected a GGUF file in .*torn\.gguf"):
            gguf_file.open_gguf(torn)


@pytest.mark.model
@pytest.mark.slow
def test_the_real_model_equals_what_transformers_reads() -> None:
    """Every tensor of SmolLM2, bit for bit; transformers takes a while for it."""
    path = source.resolve("smollm2").path
    reference = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).state_dict()

    found = gguf_file.open_gguf(path)

    assert set(found.names) == set(reference) - {"lm_head.weight"}
    for name in found.names:
        assert torch.equal(found.read(name), reference[name]), name
