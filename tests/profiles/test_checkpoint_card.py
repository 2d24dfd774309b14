"""Cards of folders in transformers' form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import BaseModelError
from profiles.byte_source import local_files
from profiles.card import FAMILIES, ModelCard, card_from_config
from profiles.checkpoint_card import checkpoint_card
from tests.profiles.model_files import safetensors_bytes, shapes_of, tiny_config, write_folder


def card_of(folder: Path) -> ModelCard:
    card = checkpoint_card(local_files(folder), "tiny")
    assert card is not None
    return card


def refused(folder: Path) -> str:
    with pytest.raises(BaseModelError) as caught:
        card_of(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_headers_and_configuration_agree(tmp_path: Path, model_type: str, shards: int) -> None:
    config = tiny_config(model_type, attention_bias=True, mlp_bias=True)
    card = card_of(write_folder(tmp_path, config, shards=shards))

    assert card.parameters == card_from_config(config).parameters
    assert card.stored == {"bf16": 2 * card.parameters}
    assert (card.stored_dtype, card.stored_bytes) == ("bf16", 2 * card.parameters)
    assert card.max_position_embeddings == 512
    assert "config.json" in card.origin


@pytest.mark.torch
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_model_that_transformers_saved_has_the_same_count(tmp_path: Path, model_type: str) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {key: value for key, value in tiny_config().items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(model_type, **sizes, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path, max_shard_size="20KB")

    card = card_of(tmp_path)

    assert card.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert card.stored == {"fp32": 4 * card.parameters}


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_decides_what_the_configuration_does_not_say(tmp_path: Path, tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    folder = write_folder(tmp_path, {**config, "tie_word_embeddings": None}, shapes_of(config))

    assert card_of(folder).tied is tied
    assert card_of(folder).parameters == card_from_config(config).parameters


def test_a_tied_head_may_be_written_all_the_same(tmp_path: Path) -> None:
    config = tiny_config()
    card = card_of(write_folder(tmp_path, config, {**shapes_of(config), "lm_head.weight": (96, 32)}))

    assert card.tied
    assert card.stored_bytes == 2 * (card.parameters + 96 * 32)


def test_tables_of_the_rotary_embedding_are_no_parameters(tmp_path: Path) -> None:
    config = tiny_config()
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}

    assert card_of(write_folder(tmp_path, config, shapes_of(config) | table)).parameters


# Method → what it calls the scales of an 8-bit weight.
EIGHT_BIT = {"edge-runtime-int8": "scale", "bitsandbytes": "SCB"}


def quantised(shapes: dict[str, tuple[int, ...]], kind: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Shapes and types as they are prepared here, and as bitsandbytes writes them."""
    found: dict[str, Any] = {}
    types: dict[str, str] = {}
    for name, shape in shapes.items():
        if "_proj.weight" not in name:
            found[name] = shape
        elif kind in EIGHT_BIT:
            scale = name.removesuffix("weight") + EIGHT_BIT[kind]
            found |= {name: shape, scale: shape[:1]}
            types |= {name: "I8", scale: "BF16" if kind == "edge-runtime-int8" else "F32"}
        else:
            state = f"{name}.quant_state.bitsandbytes__{kind}"
            found |= {name: (shape[0] * shape[1] // 2, 1), f"{name}.absmax": (4,), f"{name}.quant_map": (16,)}
            found |= {f"{name}.nested_absmax": (1,), f"{name}.nested_quant_map": (256,), state: (90,)}
            types |= {name: "U8", f"{name}.absmax": "U8", f"{name}.quant_map": "F32", state: "U8"}
    return found, types


@pytest.mark.parametrize("kind", ["nf4", *EIGHT_BIT])
def test_a_quantised_base_has_the_parameters_of_the_plain_one(tmp_path: Path, kind: str) -> None:
    config = tiny_config()
    method = {"quantization_config": {"quant_method": "bitsandbytes" if kind == "nf4" else kind}}
    shapes, types = quantised(shapes_of(config), kind)
    folder = write_folder(tmp_path, config | method)
    (folder / "model.safetensors").write_bytes(safetensors_bytes(shapes, types))

    card = card_of(folder)

    assert card.parameters == card_from_config(config).parameters
    assert card.stored["bf16"] == 2 * (card.embedding_parameters + card.vector_parameters)
    if kind == "nf4":
        assert card.stored["nf4"] > card.linear_parameters / 2
    else:
        assert card.stored["int8"] > card.linear_parameters


def test_scales_of_what_is_not_quantised_are_odd(tmp_path: Path) -> None:
    config = tiny_config()
    odd = {"model.layers.0.mlp.up_proj.scale": (64,)}

    assert "up_proj.scale" in refused(write_folder(tmp_path, config, shapes_of(config) | odd))


def test_a_packed_weight_of_another_size_is_named(tmp_path: Path) -> None:
    shapes, types = quantised(shapes_of(tiny_config()), "nf4")
    shapes["model.layers.1.mlp.up_proj.weight"] = (999, 1)
    folder = write_folder(tmp_path, tiny_config())
    (folder / "model.safetensors").write_bytes(safetensors_bytes(shapes, types))

    assert "model.layers.1.mlp.up_proj.weight" in refused(folder)
    assert "packed in 4 bits, 1024 bytes" in refused(folder)


@pytest.mark.parametrize("quantisation", [{"quant_method": "gptq"}, {"quant_method": ["x"]}, "awq", {}])
def test_weights_of_another_quantisation_are_refused(tmp_path: Path, quantisation: object) -> None:
    assert "quantised" in refused(write_folder(tmp_path, tiny_config(quantization_config=quantisation)))


def test_a_tensor_that_differs_is_missing_or_odd_is_named(tmp_path: Path) -> None:
    config = tiny_config()
    shapes = shapes_of(config)
    key = "model.layers.0.self_attn.v_proj.weight"

    wrong = refused(write_folder(tmp_path / "wrong", config, {**shapes, key: (64, 32)}))
    missing = refused(write_folder(tmp_path / "missing", config, {k: v for k, v in shapes.items() if k != key}))
    odd = refused(write_folder(tmp_path / "odd", config, {**shapes, "score.weight": (2, 32)}))
    deeper = refused(write_folder(tmp_path / "deeper", tiny_config(num_hidden_layers=3), shapes))
    endless = refused(write_folder(tmp_path / "endless", {**config, "num_hidden_layers": 2**31 - 1}, shapes))
    untied = refused(write_folder(tmp_path / "untied", {**config, "tie_word_embeddings": False}, shapes))

    assert key in wrong
    assert "(32, 32)" in wrong
    assert "(64, 32)" in wrong
    assert key in missing
    assert "'score.weight'" in odd
    assert "model.layers.2." in deeper
    assert "model.layers.2." in endless
    assert "lm_head.weight" in untied


def test_without_weights_the_configuration_is_believed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    card = card_of(tmp_path)

    assert card.parameters == card_from_config(tiny_config()).parameters
    assert (card.stored_bytes, card.stored_dtype) == (0, "")
    assert "alone" in card.origin


def test_without_a_configuration_there_is_no_card(tmp_path: Path) -> None:
    assert checkpoint_card(local_files(tmp_path), "tiny") is None


def test_a_shard_that_is_missing_or_lacks_a_promised_tensor_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, tiny_config(), shards=2)
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes(safetensors_bytes({"model.norm.weight": (32,)}))
    assert "as model.safetensors.index.json says" in refused(folder)
    second.unlink()
    assert second.name in refused(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, tiny_config(), shards=2)
    shapes = shapes_of(tiny_config())
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (folder / name).write_bytes(safetensors_bytes(shapes))
    assert "once" in refused(folder)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "model.bin", 3, ["a"], ""])
def test_an_index_names_files_of_its_own_folder_alone(tmp_path: Path, file: object) -> None:
    folder = write_folder(tmp_path, tiny_config(), shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))

    assert "expected the name of a safetensors file" in refused(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{"])
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    folder = write_folder(tmp_path, tiny_config(), shards=2)
    (folder / "model.safetensors.index.json").write_text(content)

    assert "index.json" in refused(folder)


def test_a_configuration_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profiles.checkpoint_card.CONFIG_LIMIT", 1000)
    folder = write_folder(tmp_path, tiny_config(padding="x" * 2000))

    assert "at most 1000 bytes" in refused(folder)
