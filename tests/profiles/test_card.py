"""The sizes of base models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_runtime.errors import BaseModelError, UnknownBaseError
from profiles.card import FAMILIES, card_from_config, tensor_shapes
from tests.profiles.cards import ALL, ATTENTION, smollm2, smollm2_config


def test_smollm2_has_the_published_number_of_parameters() -> None:
    card = smollm2()

    assert card.parameters == 134_515_008
    assert card.linear_parameters == 106_168_320
    assert card.head_dim == 64


def test_a_folder_gives_the_same_card_as_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(smollm2_config()))

    assert card_from_config(tmp_path, "SmolLM2-135M") == smollm2()


def test_names_and_shapes_are_those_of_the_live_modules() -> None:
    card = smollm2()

    assert card.layer_name(3, "q_proj") == "model.layers.3.self_attn.q_proj"
    assert card.layer_name(29, "down_proj") == "model.layers.29.mlp.down_proj"
    assert card.shape("k_proj") == (192, 576)
    assert card.rank_parameters(ATTENTION) == 1152 + 768 + 768 + 1152


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("value", [None, 0, "many", True])
def test_a_field_that_is_missing_or_no_number_is_named(field: str, value: object) -> None:
    config = {**smollm2_config(), field: value}

    with pytest.raises(BaseModelError, match=field):
        card_from_config(config)


def test_a_hostile_value_does_not_fill_the_message() -> None:
    for value in ([1] * 100_000, "x" * 100_000, 10**4000, 2**31):
        with pytest.raises(BaseModelError, match="hidden_size") as caught:
            card_from_config({**smollm2_config(), "hidden_size": value}, "base")
        assert len(str(caught.value)) < 300
    with pytest.raises(BaseModelError) as caught:
        card_from_config({**smollm2_config(), "model_type": "two\nlines" * 1000}, "base")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_heads_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(BaseModelError, match="found 9 and 2"):
        card_from_config({**smollm2_config(), "num_key_value_heads": 2})


def test_what_is_not_said_has_the_default_of_its_family() -> None:
    config = {**smollm2_config(), "head_dim": None, "num_key_value_heads": None, "num_attention_heads": 8}

    assert card_from_config(config).head_dim == 72
    assert card_from_config(config).num_kv_heads == 8
    assert card_from_config({**config, "model_type": "qwen3"}).head_dim == 128
    assert card_from_config({**config, "model_type": "gemma2", "tie_word_embeddings": None}).tied


def test_of_weights_that_were_not_looked_at_nothing_is_said() -> None:
    card = smollm2()

    assert (card.stored_bytes, card.stored_dtype, card.max_position_embeddings) == (0, "", 0)
    assert card_from_config({**smollm2_config(), "max_position_embeddings": 8192}).max_position_embeddings == 8192
    with pytest.raises(BaseModelError, match="max_position_embeddings"):
        card_from_config({**smollm2_config(), "max_position_embeddings": -1})


def test_an_unsupported_type_lists_the_supported_ones() -> None:
    with pytest.raises(BaseModelError, match=r"'gpt2'.*gemma.*llama.*qwen3"):
        card_from_config({**smollm2_config(), "model_type": "gpt2"})


def test_a_folder_without_config_and_a_broken_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UnknownBaseError, match=r"config\.json"):
        card_from_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BaseModelError, match="not JSON"):
        card_from_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BaseModelError, match="list"):
        card_from_config(tmp_path)


@pytest.mark.parametrize(("index", "module"), [(30, "q_proj"), (-1, "q_proj"), (0, "lm_head")])
def test_a_layer_or_module_that_does_not_exist_is_refused(index: int, module: str) -> None:
    with pytest.raises(BaseModelError):
        smollm2().layer_name(index, module)


@pytest.mark.torch
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@pytest.mark.parametrize("extra", [{}, {"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True}])
def test_names_shapes_and_counts_equal_those_of_a_real_model(model_type: str, extra: dict[str, bool]) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "vocab_size": 101,
        "pad_token_id": 0,
    }
    config = transformers.AutoConfig.for_model(model_type, **sizes, **extra)
    model = transformers.AutoModelForCausalLM.from_config(config)

    card = card_from_config(config.to_dict())

    assert card.parameters == sum(parameter.numel() for parameter in model.parameters())
    weights = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert dict(tensor_shapes(card)) == weights
    for index in range(card.num_layers):
        for module in ALL:
            assert weights[card.layer_name(index, module) + ".weight"] == card.shape(module)
