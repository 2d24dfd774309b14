"""The card of a base model in a GGUF file: its settings and tensor names in the words of config.json and transformers.

Source of the names: gguf-py's tensor map and llama.cpp's `convert_hf_to_gguf.py`, which writes Mistral as a Llama.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edge_runtime.errors import BaseModelError, unknown_name
from profiles.brief import brief
from profiles.byte_source import ByteSource
from profiles.card import EMBEDDING, FINAL_NORM, HEAD, ModelCard, card_from_config
from profiles.gguf_header import GgufHeader, PassedOver, gguf_header
from profiles.tensors import TensorInfo, with_tensors

_TOP = {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM, "output.weight": HEAD}
_LAYER: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

# Architecture, which is also the model_type → names within a layer.
ARCHITECTURES: Mapping[str, Mapping[str, str]] = {
    "llama": _LAYER,
    "qwen2": _LAYER,
    "qwen3": {**_LAYER, **_HEAD_NORMS},
    "smollm3": _LAYER,
    "gemma": _LAYER,
    "gemma2": {**_LAYER, **_FOUR_NORMS},
}
# Setting (after the architecture's name) → key of config.json.
CONFIG: Mapping[str, str] = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "vocab_size": "vocab_size",
}
# Stored beside the weights, but no parameters: tables of the rotary embedding.
_DERIVED = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight|blk\.\d+\.attn_rot_embd(\.weight)?")


def gguf_card(source: ByteSource, name: str) -> ModelCard:
    """The card of a GGUF file; reads the header only.

    Args:
        source: the file.
        name: how messages call the model.

    Raises:
        BaseModelError: a header that cannot be (see `gguf_header`), an architecture that is not in `ARCHITECTURES`, one
            part of several, a setting that is missing, or a tensor that does not fit the settings.
    """
    header = gguf_header(source)
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        found = brief(architecture)
        raise BaseModelError(f"{source.name}: {unknown_name('architecture', found, ARCHITECTURES)}; give a folder")
    parts = header.metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise BaseModelError(
            f"expected a whole model in {source.name}; found one of {parts} parts; merge them with llama.cpp's "
            f"`llama-gguf-split --merge`, or give a folder"
        )
    tensors = _renamed(header.tensors, ARCHITECTURES[architecture])
    card = card_from_config(_config(source, header, architecture, tensors), name)
    return replace(with_tensors(card, tensors, source.name), origin=f"GGUF header of {source.name}")


def _renamed(tensors: Mapping[str, TensorInfo], layer: Mapping[str, str]) -> dict[str, TensorInfo]:
    """Tensors under their transformers names; one that has none keeps its own, and is refused as odd."""
    renamed: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        if _DERIVED.fullmatch(name):
            continue
        block = re.fullmatch(r"blk\.(\d{1,9})\.(\w+)\.(weight|bias)", name)
        if block and block[2] in layer:
            renamed[f"model.layers.{int(block[1])}.{layer[block[2]]}.{block[3]}"] = tensor
        else:
            renamed[_TOP.get(name, name)] = tensor
    return renamed


def _config(
    source: ByteSource, header: GgufHeader, architecture: str, tensors: Mapping[str, TensorInfo]
) -> dict[str, Any]:
    """What config.json would say."""
    first = "model.layers.0"
    config: dict[str, Any] = {
        "model_type": architecture,
        "tie_word_embeddings": HEAD not in tensors,
        "attention_bias": f"{first}.self_attn.q_proj.bias" in tensors,
        "mlp_bias": f"{first}.mlp.up_proj.bias" in tensors,
    }
    if EMBEDDING in tensors:
        # Older files do not state the vocabulary; where they do, it has to agree.
        config["vocab_size"] = tensors[EMBEDDING].shape[0]
    for key, ours in CONFIG.items():
        value = header.metadata.get(f"{architecture}.{key}")
        if isinstance(value, PassedOver):
            raise BaseModelError(
                f"{source.name}: expected one number as {architecture}.{key}; found {value.what}: layers of unequal "
                f"size are not supported; give another base"
            )
        if value is not None:
            config[ours] = value
    return config
