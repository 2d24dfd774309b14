"""A fleet of unequal devices whose causal language model learns to answer as the clients of natural-instructions do.

Each task's rows are on one device, or dealt by Dirichlet; the last blocks are adapted, so that a life takes minutes on
one core: what the blocks below make of a text is computed once (`together_answers`). Texts are the product's: prompts
masked, the answer learned with its end. Rows that would be cut are left out, and tasks with few others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.wire_fleet import dealt
from edge_runtime.train import base
from edge_runtime.train.checkpointing import decoder_layers
from edge_runtime.train.data import Example, Tokenised, load_examples, split, tokenise_whole
from edge_runtime.train.fresh import slot_for
from edge_runtime.train.stdlib_docs import GROUPS

LENGTH = 112
"""Tokens of a text, at most."""
ROWS, HELD_OUT = 60, 10
"""Of each task."""
BLOCKS = 3
"""Adapted, the last ones."""
MODULES = ("self_attn.q_proj", "self_attn.v_proj")
SCALING = 2.0
TAKING_PART, BATCH = 4, 4


@dataclass(frozen=True, eq=False)
class Fleet:
    """Everything that is the same for every method.

    Attributes:
        model: transformers' causal language model in float32, without an adapter.
        fingerprint: of that.
        devices: name → rank and texts.
        held_out: texts of every task that no device has.
        shapes: (d_out, d_in) of each adapted layer.
        scaling: PEFT's lora_alpha / r.
        taking_part: devices of a round.
        batch: texts of an optimiser step of a device.
    """

    model: Any
    fingerprint: str
    devices: Mapping[str, tuple[int, list[Tokenised]]]
    held_out: list[Tokenised]
    shapes: Mapping[str, tuple[int, int]]
    scaling: float = SCALING
    taking_part: int = TAKING_PART
    batch: int = BATCH


def build(
    folder: Path,
    seed: int,
    ranks: Sequence[int],
    *,
    alpha: float = 0.0,
    model: str = "smollm2",
    device: str = "cpu",
    blocks: int = BLOCKS,
) -> Fleet:
    """The fleet of that seed: who has which texts.

    Args:
        folder: of the clients' rows; the standard library's docstrings where it has none.
        seed: whose tasks they are, and what is held out; the rows to train on are the same for all seeds.
        ranks: of the devices.
        alpha: see `wire_fleet.dealt`; 0 where each task is on one device.
        model: an alias, folder, GGUF file or hub id.
        device: where the model is, in torch's words.
        blocks: that are adapted, the last ones.
    """
    loaded = base.load(base.prepare(model, precision="fp32"), compute_dtype="fp32", device=device)
    texts: list[Tokenised] = []
    tasks: list[int] = []
    held_out: list[Tokenised] = []
    for train, others in _tasks(folder):
        own = _fitting(train, loaded.tokenizer, 0, ROWS)
        if len(own) == ROWS:
            tasks += [max(tasks, default=-1) + 1] * ROWS
            texts += own
            held_out += _fitting(others, loaded.tokenizer, seed, HELD_OUT)
    shares = dealt(texts, tasks, len(ranks), seed, alpha)
    devices = {f"device-{i}": (rank, shares[i]) for i, rank in enumerate(ranks)}
    layers = range(len(decoder_layers(loaded.model)))[-blocks:]
    slot = slot_for(loaded.model, [f"layers.{at}.{module}" for at in layers for module in MODULES], 1)
    return Fleet(loaded.model.eval(), loaded.prepared.fingerprint, devices, held_out, dict(slot.shapes))


def _tasks(folder: Path) -> Iterator[tuple[Sequence[Example], Sequence[Example]]]:
    """Of each task, rows to train on and rows to judge by."""
    clients = sorted(folder.glob("*.train.jsonl"))
    for path in clients:
        yield load_examples(str(path)), load_examples(str(path).replace(".train.", ".eval."))
    for group in () if clients else GROUPS:
        yield split(load_examples(f"stdlib-docs:{group}"))


def _fitting(rows: Sequence[Example], tokenizer: Any, seed: int, count: int) -> list[Tokenised]:
    """That many rows, drawn by chance, of those that need not be cut; fewer where there are no more."""
    found: list[Tokenised] = []
    for at in np.random.default_rng(seed).permutation(len(rows)):
        tokenised = tokenise_whole(rows[at], tokenizer)
        if len(found) < count and len(tokenised.input_ids) <= LENGTH and tokenised.learned:
            found.append(tokenised)
    return found
