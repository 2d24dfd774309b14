"""The demo's base with an adapter says in llama.cpp, token by token, what it says in the live model."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("xllamacpp")

from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.train.base import load, prepare
from edge_runtime.train.generate import generate
from export import gguf, gguf_merged
from export.attached import attached
from export.float32 import in_float32
from export.subject import Subject

pytestmark = [pytest.mark.torch, pytest.mark.model]

TEXTS = ("The capital of France is", "def mean(values):\n", "Dear neighbours,", "Three reasons to sleep well: 1.")
COUNT = 64
SHAPES = {"q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576), "o_proj": (576, 576)}


class Said(NamedTuple):
    """What the live model says, and what the base alone says, after the same prompts."""

    subject: Subject
    prompts: list[tuple[int, ...]]
    live: list[list[int]]
    plain: list[list[int]]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Said:
    """Rank 8 on all attention layers, large enough that nearly every answer becomes another."""
    prepared = prepare("smollm2", precision="bf16", cache=tmp_path_factory.mktemp("cache"))
    draw = np.random.default_rng(0)
    layers = {}
    for index in range(30):
        for module, (d_out, d_in) in SHAPES.items():
            a, b = draw.standard_normal((8, d_in)) / d_in**0.5, draw.standard_normal((d_out, 8))
            layers[f"model.layers.{index}.self_attn.{module}"] = Pair(
                a.astype(np.float32), (0.05 * b).astype(np.float32)
            )
    base = load(prepared, compute_dtype="bf16")
    prompts = [tuple(base.tokenizer.encode(text, add_special_tokens=False)) for text in TEXTS]
    plain = greedy(base.model, prompts)
    attached(base.model, Adapter(layers), scaling=2.0)
    live = greedy(base.model, prompts)
    return Said(Subject(Adapter(layers), 2.0, "smollm2", prepared), prompts, live, plain)


def greedy(model: Any, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """As `TorchEngine` does it, for all prompts side by side."""
    with in_float32(model):
        return [list(answer) for answer in generate(model, prompts, stop=(), max_new_tokens=COUNT)]


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    same = [a == b for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True)]
    assert len(same) >= 256
    return float(np.mean(same))


@pytest.mark.parametrize("form", [gguf, gguf_merged], ids=["gguf", "gguf-merged"])
def test_nearly_every_token_is_the_same(said: Said, tmp_path: Path, form: ModuleType) -> None:
    form.write(said.subject, tmp_path)
    engine = form.open_engine(said.subject, tmp_path)
    found = [engine.greedy(prompt, COUNT) for prompt in said.prompts]
    engine.close()

    assert agreement(found, said.live) >= 0.95
    assert agreement(said.plain, said.live) < 0.5
