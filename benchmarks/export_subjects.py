"""What the benchmark of exports exports: a trained adapter of SmolLM2-135M, and random ones of two other shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.train import data, evaluating, families, fresh, loop
from edge_runtime.train.base import PreparedBase, load, prepare
from export.subject import Subject

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
RANK, OTHER_RANK, SCALING = 8, 4, 2.0
LENGTH = 64
"""Tokens of an example."""
SHAPES: dict[str, dict[str, Any]] = {
    # Two groups of queries to each key, and a head of its own.
    "Llama": {"model_type": "llama", "tie_word_embeddings": False, "rope_theta": 5e5},
    # Biases on queries, keys and values, and a head that is the embedding.
    "Qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1e6},
}


@dataclass(frozen=True, eq=False)
class Case:
    """One base with its adapters.

    Attributes:
        name: for people.
        subject: what is exported.
        other: the same base with an adapter of another rank.
        prompts: token ids of what both answer.
    """

    name: str
    subject: Subject
    other: Subject
    prompts: tuple[tuple[int, ...], ...]


def trained(*, steps: int, prompts: int, prompt_tokens: int) -> Case:
    """SmolLM2-135M in float32, with an adapter of rank 8 after so many real steps."""
    prepared = prepare("smollm2", precision="fp32", say=print)
    loaded = load(prepared, compute_dtype="fp32")
    train, held_out = data.split(data.load_examples("stdlib-docs:text"))
    slot = fresh.slot_for(loaded.model, ATTENTION, RANK)
    family = families.get("lora")
    live = family.attach(loaded.model, slot, scaling=SCALING)
    family.load(live, fresh.fresh_adapter(slot))
    examples = data.tokenise_all(train[: 4 * steps], loaded.tokenizer, LENGTH).examples
    before = evaluating.evaluate(live, examples[:4]).loss
    loop.train_round(live, examples, loop.LocalTask(steps=steps, learning_rate=2e-3, micro_batch=4))
    print(f"{steps} steps: training loss {before:.3f} → {evaluating.evaluate(live, examples[:4]).loss:.3f}")
    subject = Subject(family.read_all(live), SCALING, "smollm2", prepared)
    rows = [data.tokenise_whole(example, loaded.tokenizer).input_ids[:prompt_tokens] for example in held_out[:prompts]]
    return Case("SmolLM2-135M", subject, _other(subject, ATTENTION), tuple(rows))


def shaped(name: str, folder: Path, *, prompts: int, prompt_tokens: int) -> Case:
    """A tiny random model of a shape, with a random adapter of every linear layer."""
    tokens = prepare("smollm2", precision="fp32").folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokens, local_files_only=True)
    source = folder / name
    _write_model(SHAPES[name], tokenizer, source)
    prepared = prepare(str(source), precision="fp32", cache=folder / "cache")
    subject = Subject(_random(prepared, LINEAR, RANK, seed=1), SCALING, str(source), prepared)
    draw = np.random.default_rng(0)
    rows = draw.integers(100, len(tokenizer), (prompts, prompt_tokens))
    return Case(name, subject, _other(subject, LINEAR), tuple(tuple(int(token) for token in row) for row in rows))


def _write_model(shape: dict[str, Any], tokenizer: Any, folder: Path) -> None:
    config = transformers.AutoConfig.for_model(
        **shape, vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.15,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.15)  # transformers begins with zeros, which hide a lost bias
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _other(subject: Subject, modules: Sequence[str]) -> Subject:
    """The same base with a random adapter of another rank."""
    if subject.prepared is None:
        raise ValueError("a case has its base with it")
    return replace(subject, adapter=_random(subject.prepared, modules, OTHER_RANK, seed=2))


def _random(prepared: PreparedBase, modules: Sequence[str], rank: int, *, seed: int) -> Adapter:
    slot = fresh.slot_for(load(prepared, compute_dtype="fp32").model, modules, rank)
    draw = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return (draw.standard_normal(shape) * 0.05).astype(np.float32)

    return Adapter(
        {
            name: Pair(normal(layer.held, layer.d_in), normal(layer.d_out, layer.held))
            for name, layer in slot.layers.items()
        }
    )
