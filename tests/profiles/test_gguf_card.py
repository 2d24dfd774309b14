"""Cards of GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import BaseModelError
from profiles.byte_source import ByteSource, local_file
from profiles.card import ModelCard, card_from_config
from profiles.gguf_card import ARCHITECTURES, gguf_card
from profiles.packaged import packaged_file
from tests.profiles.model_files import gguf_bytes, gguf_settings, gguf_shapes, tiny_config, tiny_gguf


def source(content: bytes) -> ByteSource:
    return ByteSource("tiny.gguf", len(content), lambda at, count: content[at : at + count])


def changed(
    settings: dict[str, Any] | None = None, shapes: dict[str, tuple[int, ...]] | None = None, without: str = ""
) -> str:
    """What is said about a file with other settings and tensors, or without one of them."""
    config = tiny_config()
    said = {key: value for key, value in (gguf_settings(config) | (settings or {})).items() if key != without}
    held = {name: shape for name, shape in (gguf_shapes(config) | (shapes or {})).items() if name != without}
    with pytest.raises(BaseModelError) as caught:
        gguf_card(source(gguf_bytes(said, held)), "tiny")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_it_has_the_sizes_of_the_model_it_was_made_from(model_type: str, tied: bool) -> None:
    config = tiny_config(model_type, tie_word_embeddings=tied)
    card = gguf_card(source(tiny_gguf(model_type, tie_word_embeddings=tied)), "tiny")
    expected = card_from_config(config, "tiny")

    assert (card.tied, card.max_position_embeddings) == (tied, 512)
    assert card.parameters == expected.parameters
    assert card.projections == expected.projections
    assert card.layer_vectors == expected.layer_vectors
    assert card.stored == {"fp32": 4 * card.parameters}
    assert card.stored_dtype == "fp32"


def test_biases_are_found_by_their_tensors() -> None:
    card = gguf_card(source(tiny_gguf("llama", attention_bias=True, mlp_bias=True)), "tiny")

    assert card.parameters == card_from_config(tiny_config(attention_bias=True, mlp_bias=True)).parameters


@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_give_a_card_or_one_line(flips: list[tuple[int, int]]) -> None:
    content = bytearray(tiny_gguf())
    for at, value in flips:
        content[at] = value
    try:
        found: ModelCard | str = gguf_card(source(bytes(content)), "tiny")
    except BaseModelError as error:
        found = str(error)

    assert isinstance(found, ModelCard) or "\n" not in found


@pytest.mark.model
def test_the_packaged_model_has_the_published_number_of_parameters() -> None:
    path = packaged_file("smollm2")
    card = gguf_card(local_file(path), "SmolLM2")

    assert card.parameters == 134_515_008
    assert card.tied
    assert card.max_position_embeddings == 8192
    assert card.stored_dtype == "q4_1"
    assert 0.98 < card.stored_bytes / path.stat().st_size < 1


def test_an_old_file_that_does_not_state_its_vocabulary_is_read() -> None:
    config = tiny_config()
    settings = gguf_settings(config)
    del settings["llama.vocab_size"]

    assert gguf_card(source(gguf_bytes(settings, gguf_shapes(config))), "tiny").vocab_size == 96


def test_tables_of_the_rotary_embedding_are_no_parameters() -> None:
    config = tiny_config()
    content = gguf_bytes(gguf_settings(config), {"rope_freqs.weight": (8,), **gguf_shapes(config)})

    assert gguf_card(source(content), "tiny").parameters == card_from_config(config).parameters


def test_an_unsupported_architecture_lists_the_supported_ones() -> None:
    message = changed({"general.architecture": "mamba"})

    assert "'mamba'" in message
    assert all(name in message for name in ARCHITECTURES)
    assert "None" in changed(without="general.architecture")


def test_the_first_tensor_that_differs_is_named_with_both_shapes() -> None:
    message = changed(shapes={"blk.1.attn_k.weight": (48, 32)})

    assert "'model.layers.1.self_attn.k_proj.weight'" in message
    assert "(32, 32)" in message
    assert "(48, 32)" in message


def test_a_missing_an_odd_and_a_surplus_tensor_are_named() -> None:
    assert "model.layers.0.mlp.up_proj" in changed(without="blk.0.ffn_up.weight")
    assert "'blk.0.ffn_gate_exps.weight'" in changed(shapes={"blk.0.ffn_gate_exps.weight": (8, 64, 32)})
    assert "model.layers.2.input_layernorm.weight" in changed(shapes={"blk.2.attn_norm.weight": (32,)})
    assert "(96, 32)" in changed({"llama.vocab_size": 100})


def test_a_part_of_a_model_and_layers_of_unequal_size_are_refused() -> None:
    assert "--merge" in changed({"split.count": 3})
    assert "unequal" in changed({"llama.attention.head_count_kv": [2, 4]})


def test_a_setting_that_is_missing_or_no_number_is_named() -> None:
    assert "num_hidden_layers" in changed(without="llama.block_count")
    assert "hidden_size" in changed({"llama.embedding_length": "wide"})
    assert "num_key_value_heads" in changed({"llama.attention.head_count_kv": 3})


def test_a_name_in_the_file_cannot_break_the_line(tmp_path: Path) -> None:
    config = tiny_config()
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf_bytes(gguf_settings(config), {**gguf_shapes(config), "two\nlines": (4,)}))

    with pytest.raises(BaseModelError) as caught:
        gguf_card(local_file(path), "tiny")
    assert "\n" not in str(caught.value)
