"""What GGUF calls the parts of a model, and in which order it stores their rows: both ways, for reading and writing.

Source of the format: ggml's `docs/gguf.md`; of the names: gguf-py's tensor map; of the row order: llama.cpp's
`convert_hf_to_gguf.py` (`LlamaModel.permute`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from profiles import gguf_card


@dataclass(frozen=True)
class Architecture:
    """A family of models as GGUF stores it.

    Attributes:
        class_name: of transformers' causal language model.
        interleaved: whether the rows of the query and key weights are stored in pairs (x₀ x₁ of each rotation side by
            side), where transformers keeps two halves.
    """

    class_name: str
    interleaved: bool


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", interleaved=True),
    "qwen2": Architecture("Qwen2ForCausalLM", interleaved=False),
    "qwen3": Architecture("Qwen3ForCausalLM", interleaved=False),
}
"""GGUF's name, which is also transformers' `model_type`."""

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONFIG = {
    **{setting: key for setting, key in gguf_card.CONFIG.items() if setting != "vocab_size"},
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
"""GGUF key (after the architecture's name) → key of config.json."""
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""transformers' name of a special token → GGUF's."""
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Values of `tokenizer.ggml.token_type`."""


_OF_BLOCK = {theirs: ours for ours, theirs in BLOCK.items()}
_OF_TOP = {theirs: ours for ours, theirs in TOP.items()}


def to_transformers(name: str) -> str | None:
    """The name that transformers has for a tensor in a GGUF file; None for one that this table does not know."""
    return _renamed(name, ("blk", BLOCK, TOP), "model.layers")


def to_gguf(name: str) -> str | None:
    """The name that GGUF has for one of transformers' tensors; None for one that this table does not know."""
    return _renamed(name, ("model.layers", _OF_BLOCK, _OF_TOP), "blk")


def _renamed(name: str, known: tuple[str, Mapping[str, str], Mapping[str, str]], blocks: str) -> str | None:
    before, of_block, of_top = known
    found = re.fullmatch(rf"(?:{re.escape(before)}\.(\d+)\.)?(.+)\.(weight|bias)", name)
    if found is None:
        return None
    index, part, kind = found.groups()
    if index is None:
        return f"{of_top[part]}.{kind}" if part in of_top else None
    return f"{blocks}.{index}.{of_block[part]}.{kind}" if part in of_block else None


def paired_heads(architecture: str, config: Mapping[str, Any]) -> dict[str, int]:
    """Projection → heads, of those whose rows the architecture stores in pairs; none where it stores halves."""
    if not ARCHITECTURES[architecture].interleaved:
        return {}
    queries = int(config["num_attention_heads"])
    return {"q_proj": queries, "k_proj": int(config.get("num_key_value_heads", queries))}


def halves(weight: Any, heads: int) -> Any:
    """Rows from pairs to halves: within each head of d rows, row 2i+j comes to j·(d/2)+i."""
    pairs_of_head = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs_of_head.swapaxes(1, 2).reshape(weight.shape))


def pairs(weight: Any, heads: int) -> Any:
    """Rows from halves to pairs, the inverse of `halves`: row j·(d/2)+i of each head comes to 2i+j."""
    halves_of_head = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves_of_head.swapaxes(1, 2).reshape(weight.shape))
