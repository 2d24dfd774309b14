"""Checkpoints of no weight, written by hand: what the readers of headers are tested with."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from profiles.card import card_from_config, tensor_shapes

SAFETENSORS_BYTES = {"F32": 4, "BF16": 2, "U8": 1, "I8": 1}
# GGUF: architecture's tensor names by transformers' names.
GGUF_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA2_LAYER = {
    **GGUF_LAYER,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}

Shapes = dict[str, tuple[int, ...]]


def tiny_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """A model of two layers."""
    return {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 96,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        **changes,
    }


def shapes_of(config: Mapping[str, Any]) -> Shapes:
    """The tensors that a configuration promises; a test with transformers holds them against real ones."""
    return dict(tensor_shapes(card_from_config(config, "tiny")))


def safetensors_bytes(shapes: Mapping[str, Sequence[int]], dtype: str | Mapping[str, str] = "BF16") -> bytes:
    """A safetensors file of zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        kind = dtype if isinstance(dtype, str) else dtype.get(name, "BF16")
        size = SAFETENSORS_BYTES[kind]
        for width in shape:
            size *= width
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return framed(json.dumps(header).encode(), bytes(end))


def framed(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file with this header, whatever it is."""
    return struct.pack("<Q", len(header)) + header + data


def write_folder(folder: Path, config: Mapping[str, Any], shapes: Shapes | None = None, shards: int = 1) -> Path:
    """A model folder of zeros, its tensors dealt out to so many files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in weights(shapes_of(config) if shapes is None else shapes, shards).items():
        (folder / name).write_bytes(content)
    return folder


def weights(shapes: Shapes, shards: int = 1) -> dict[str, bytes]:
    """File name → content: one file, or an index and its shards."""
    if shards == 1:
        return {"model.safetensors": safetensors_bytes(shapes)}
    names = list(shapes)
    dealt = {f"model-{part + 1:05d}-of-{shards:05d}.safetensors": names[part::shards] for part in range(shards)}
    index = {"metadata": {}, "weight_map": {name: file for file, held in dealt.items() for name in held}}
    files = {file: safetensors_bytes({name: shapes[name] for name in held}) for file, held in dealt.items()}
    return {"model.safetensors.index.json": json.dumps(index).encode(), **files}


def text(content: str) -> bytes:
    """A text as GGUF writes it."""
    return struct.pack("<Q", len(content.encode())) + content.encode()


def pair(key: str, value: str | float | list[Any]) -> bytes:
    """A setting as GGUF writes it."""
    match value:
        case bool():
            return text(key) + struct.pack("<IB", 7, value)
        case int():
            return text(key) + struct.pack("<II", 4, value)
        case float():
            return text(key) + struct.pack("<If", 6, value)
        case str():
            return text(key) + struct.pack("<I", 8) + text(value)
        case [str(), *_]:
            return text(key) + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(text(str(entry)) for entry in value)
        case _:
            return text(key) + struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)


def gguf_bytes(
    settings: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], version: int = 3, alignment: int = 32
) -> bytes:
    """A GGUF file of zeros in float32."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(shapes), len(settings))
    head += b"".join(pair(key, value) for key, value in settings.items())
    end = 0
    for name, shape in shapes.items():
        begin, size = -(-end // alignment) * alignment, 4
        for width in shape:
            size *= width
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), 0, begin)
        end = begin + size
    return head + bytes(-len(head) % alignment + end)


def gguf_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a configuration under their GGUF names."""
    layer = GEMMA2_LAYER if config["model_type"] == "gemma2" else GGUF_LAYER
    renamed = {}
    for name, shape in shapes_of(config).items():
        if name in GGUF_TOP:
            renamed[GGUF_TOP[name]] = shape
        else:
            _, _, index, rest = name.split(".", 3)
            module, _, kind = rest.rpartition(".")
            renamed[f"blk.{index}.{layer[module]}.{kind}"] = shape
    return renamed


def gguf_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration as llama.cpp's converter writes them, with a tokenizer of its vocabulary."""
    name = config["model_type"]
    return {
        "general.architecture": name,
        "general.name": "tiny",
        f"{name}.block_count": config["num_hidden_layers"],
        f"{name}.context_length": config["max_position_embeddings"],
        f"{name}.embedding_length": config["hidden_size"],
        f"{name}.feed_forward_length": config["intermediate_size"],
        f"{name}.attention.head_count": config["num_attention_heads"],
        f"{name}.attention.head_count_kv": config["num_key_value_heads"],
        f"{name}.attention.key_length": config["head_dim"],
        f"{name}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{name}.vocab_size": config["vocab_size"],
        "tokenizer.ggml.tokens": [f"token{index}" for index in range(config["vocab_size"])],
        "tokenizer.ggml.token_type": [1] * config["vocab_size"],
        "tokenizer.chat_template": "{{ messages }}" * 500,
    }


def tiny_gguf(model_type: str = "llama", **changes: Any) -> bytes:
    """The GGUF file of a model of two layers."""
    config = tiny_config(model_type, **changes)
    return gguf_bytes(gguf_settings(config), gguf_shapes(config))
