"""Base models of known shapes with random weights: what they cost to train does not depend on what they know.

The tokenizer is that of SmolLM2, so that real text is what they are trained on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# The published shapes of SmolLM2-360M and Qwen2.5-0.5B, and a toy, most of whose numbers are embeddings.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-toy": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 172,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 49152,
        "tie_word_embeddings": True, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000,
        "hidden_act": "silu",
    },
    "llama-0.36b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 960, "intermediate_size": 2560,
        "num_hidden_layers": 32, "num_attention_heads": 15, "num_key_value_heads": 5, "vocab_size": 49152,
        "tie_word_embeddings": True, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000,
        "hidden_act": "silu",
    },
    "qwen-0.5b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
        "tie_word_embeddings": True, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
        "hidden_act": "silu",
    },
}  # fmt: skip

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def random_base(name: str, cache: Path) -> str:
    """The folder of a base of that shape, made at the first call.

    Args:
        name: a key of `SHAPES`, or any other base, which is returned as it is.
        cache: where converted bases are kept too.
    """
    if name not in SHAPES:
        return name
    from edge_runtime.train.base import prepare  # noqa: PLC0415 - only where a base has to be made

    folder = cache / "random" / name
    if (folder / "model.safetensors").is_file():
        return str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = prepare("smollm2", precision="nf4", cache=cache).folder
    for companion in COMPANIONS:
        if (source / companion).is_file():
            (folder / companion).write_bytes((source / companion).read_bytes())
    config = {**SHAPES[name], "torch_dtype": "bfloat16"}
    _widen_tokenizer(folder / COMPANIONS[0], config["vocab_size"])
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _write(dict(_tensors(config)), folder / "model.safetensors")
    return str(folder)


def _widen_tokenizer(path: Path, size: int) -> None:
    """Give a tokenizer as many entries as the model has rows: what it costs in memory goes by their number.

    Each new entry is a merge of two old ones, at the lowest priority, so texts are cut into words almost as before.
    """
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    taken = {*vocabulary, *(added["content"] for added in tokenizer["added_tokens"])}
    words = sorted(word for word in vocabulary if word.isalpha() and len(word) > 3)
    draw = random.Random(0)
    while len(taken) < size:
        left, right = draw.choice(words), draw.choice(words)
        if left + right not in taken:
            vocabulary[left + right] = len(taken)
            taken.add(left + right)
            merges.append([left, right] if isinstance(merges[0], list) else f"{left} {right}")
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name → shape of every tensor."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", (hidden,)
        for module, d_out in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
            yield f"{layer}.self_attn.{module}_proj.weight", (d_out, hidden)
            if config["model_type"] == "qwen2" and module != "o":
                yield f"{layer}.self_attn.{module}_proj.bias", (d_out,)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)


def _write(shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """A safetensors file in bf16, one tensor at a time: norms are one, all else is drawn."""
    draw = np.random.default_rng(0)
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.with_suffix(".part").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            values = np.ones(shape, np.float32) if "norm" in name else draw.normal(0, 0.02, shape).astype(np.float32)
            # A bf16 is the upper half of a float32.
            file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())
    path.with_suffix(".part").rename(path)


if __name__ == "__main__":
    import sys

    print(random_base(sys.argv[1], Path(sys.argv[2])))
