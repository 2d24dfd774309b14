"""A GGUF file as a checkpoint: configuration, tokenizer and tensors in one reading, under their transformers names.

transformers can read GGUF too, but holds the whole model in float32 while it does, parses the file three times, and its
version 4.57 gives the tokenizer of a Llama the wrong end-of-sequence token and a prefix of its own. Sources of the
format are those of `gguf_names`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.errors import BaseModelError, missing_extra, unknown_name
from edge_runtime.train.checkpoint import Checkpoint
from edge_runtime.train.gguf_names import (
    ARCHITECTURES,
    BLOCK,
    CONFIG,
    CONTROL,
    ROLES,
    TOP,
    USER_DEFINED,
    halves,
    paired_heads,
    to_transformers,
)
from edge_runtime.train.gguf_reader import Stored, read_parts

try:
    import gguf
    import numpy as np
    import tokenizers
    import torch
    from tokenizers import pre_tokenizers
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "gguf", "client") from missing

_ESSENTIAL = frozenset(CONFIG) - {"attention.head_count_kv", "attention.key_length", "rope.freq_base"}

_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _split_by(pattern: str) -> Callable[[], Any]:
    return lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# `tokenizer.ggml.pre` → how text is cut before byte-pair encoding, as the models' own tokenizer.json cut it.
PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": _split_by(_QWEN),
    "llama-bpe": _split_by(_LLAMA3),
}


def open_gguf(path: Path) -> Checkpoint:
    """A GGUF file of one of `ARCHITECTURES`; tensors come out as float32, in transformers' order of rows.

    Raises:
        BaseModelError: not GGUF, another architecture, or a tensor or setting that this cannot carry over.
    """
    try:
        parts = read_parts(path)
    except (ValueError, OSError) as error:
        raise BaseModelError(f"expected a GGUF file in {path}; found: {error}; fetch it again") from error
    metadata = _Metadata(path, parts.settings)
    stored = {_hf_name(path, name): tensor for name, tensor in parts.tensors.items()}
    architecture = metadata["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise BaseModelError(f"{path}: {unknown_name('architecture', architecture, ARCHITECTURES)}; give a folder")
    config = _config(metadata, architecture, stored)
    heads = paired_heads(architecture, config)

    def rows(name: str, start: int, stop: int) -> torch.Tensor:
        count = next((count for part, count in heads.items() if f".{part}." in name), None)
        order = None if count is None else halves(np.arange(stored[name].shape[0]), count)[start:stop]
        return torch.from_numpy(_dequantised(path, stored[name], slice(start, stop) if order is None else order))

    return Checkpoint(
        config,
        tuple(stored),
        lambda name: stored[name].shape,
        rows,
        lambda target: _write_tokenizer(metadata, target),
    )


@dataclass(frozen=True, eq=False)
class _Metadata:
    """The metadata of a GGUF file by key."""

    path: Path
    values: Mapping[str, Any]

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            raise BaseModelError(f"expected the key '{key}' in {self.path}; found none; give a complete GGUF file")
        return self.values[key]


def _dequantised(path: Path, tensor: Stored, rows: Any) -> Any:
    """Rows of a tensor as a float32 array of their own; `rows` is a slice or an array of indices."""
    # Mapped anew each time, so that the pages of what was read before can go.
    mapped = np.memmap(path, dtype=tensor.number, mode="r", offset=tensor.offset, shape=tensor.layout)
    return np.array(gguf.dequantize(mapped[rows], tensor.block_type), dtype=np.float32)


def _hf_name(path: Path, name: str) -> str:
    known = to_transformers(name)
    if known is None:
        raise BaseModelError(
            f"{path}: {unknown_name('tensor', name, [*TOP, *BLOCK])}; give a Hugging Face folder instead"
        )
    return known


def _config(metadata: _Metadata, architecture: str, stored: Mapping[str, Any]) -> dict[str, Any]:
    scaling = f"{architecture}.rope.scaling.type"
    if scaling in metadata and metadata[scaling] != "none":
        raise BaseModelError(
            f"expected {metadata.path} without scaling of the rotary embedding; found '{metadata[scaling]}'; "
            f"give a Hugging Face folder instead"
        )
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[architecture].class_name],
        "model_type": architecture,
        "hidden_act": "silu",
        "vocab_size": int(stored["model.embed_tokens.weight"].shape[0]),
        "tie_word_embeddings": "lm_head.weight" not in stored,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in stored,
        "dtype": "float32",
    }
    for key, ours in CONFIG.items():
        if key in _ESSENTIAL or f"{architecture}.{key}" in metadata:
            value = metadata[f"{architecture}.{key}"]
            # A float32 in the file: its shortest decimal (1e-05) is what the model's makers wrote.
            config[ours] = float(str(np.float32(value))) if isinstance(value, float) else value
    for role in ("bos", "eos"):
        if f"tokenizer.ggml.{role}_token_id" in metadata:
            config[f"{role}_token_id"] = metadata[f"tokenizer.ggml.{role}_token_id"]
    return config


def _write_tokenizer(metadata: _Metadata, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, written by hand: both majors of transformers read them alike."""
    _byte_pairs(metadata).save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata[f"{metadata['general.architecture']}.context_length"],
    }
    for ours, role in ROLES.items():
        if f"tokenizer.ggml.{role}_token_id" in metadata:
            config[ours] = metadata["tokenizer.ggml.tokens"][metadata[f"tokenizer.ggml.{role}_token_id"]]
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def _byte_pairs(metadata: _Metadata) -> Any:
    kind, pre = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        known = [f"gpt2/{name}" for name in PRE_TOKENIZERS]
        raise BaseModelError(f"{metadata.path}: {unknown_name('tokenizer', f'{kind}/{pre}', known)}; give a folder")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = PRE_TOKENIZERS[pre]()
    bpe.decoder = tokenizers.decoders.ByteLevel()
    typed = list(zip(tokens, types, strict=True))
    added = tokenizers.AddedToken
    bpe.add_special_tokens([added(token, normalized=False, special=True) for token, type_ in typed if type_ == CONTROL])
    bpe.add_tokens([added(token, normalized=False) for token, type_ in typed if type_ == USER_DEFINED])
    return bpe
