"""Tiny bases of several architectures, prepared for export, and adapters with ranks that differ by layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.train.base import PreparedBase, prepare
from export.subject import Logits
from tests.export.subjects import LINEAR

ARCHITECTURES = ("llama", "qwen2", "qwen3")
CONFIGS = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
SIZES: dict[str, Any] = {
    "vocab_size": 520,  # more rows than the tokenizer has tokens, as published models have
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BLOCK = tuple(f"self_attn.{name}" if name[0] in "qkvo" else f"mlp.{name}" for name in LINEAR)


def write_base(folder: Path, tokenizer: Path, model_type: str, **settings: Any) -> Path:
    """A model with random weights and biases, with the tokenizer of another folder."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = getattr(transformers, CONFIGS[model_type])(**SIZES | settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):  # they begin as zeros, and would tell no permutation from none
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    for path in tokenizer.glob("chat_template.*"):
        shutil.copyfile(path, folder / path.name)
    return folder


def prepared_base(
    folder: Path, tokenizer: Path, model_type: str, *, precision: str = "fp32", **settings: Any
) -> PreparedBase:
    """The same, prepared."""
    source = write_base(folder / "source", tokenizer, model_type, **settings)
    return prepare(str(source), precision=precision, cache=folder / "cache")


def uneven_adapter(prepared: PreparedBase, modules: tuple[str, ...] = BLOCK) -> Adapter:
    """Pairs of ranks 1 to 6 in all blocks but the first, no layer like the one before."""
    config = json.loads((prepared.folder / "config.json").read_text(encoding="utf-8"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    width = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    shapes = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    draw = np.random.default_rng(0)
    layers = {}
    for index in range(1, config["num_hidden_layers"]):
        for place, module in enumerate(modules):
            (d_out, d_in), rank = shapes[module.rpartition(".")[2]], 1 + (5 * index + 3 * place) % 6
            a, b = draw.standard_normal((rank, d_in)), draw.standard_normal((d_out, rank))
            layers[f"model.layers.{index}.{module}"] = Pair((0.2 * a).astype(np.float32), (0.2 * b).astype(np.float32))
    return Adapter(layers)


def log_probabilities(logits: Logits) -> Logits:
    """The logarithm of the probabilities that logits stand for."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    found: Logits = (wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))).astype(np.float32)
    return found
