"""What the tests of exports export: adapters of the tiny base model, and what the live model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edge_runtime.lora.adapter import Adapter, LayerSlot, Slot
from edge_runtime.train import families
from edge_runtime.train.base import PreparedBase, load
from export.subject import Logits, Subject
from export.verify import logits
from tests.train.fleet_families import card_of, slot_of
from tests.train.test_dense_modules import adapter_for

TRACES = tuple(int(part) for part in version("transformers").split(".")[:2]) < (4, 58)
"""Whether optimum-onnx goes with the transformers at hand."""
PROMPT = (5, 9, 77, 301, 4, 4, 18, 260)
SCALING = 2.0
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Live(NamedTuple):
    """A subject and what its live model computes in float32.

    Attributes:
        logits: of PROMPT.
        plain: of PROMPT, of the base model alone.
        greedy: the next eight tokens.
    """

    subject: Subject
    logits: Logits
    plain: Logits
    greedy: list[int]


def family_adapter(tiny_base: Path, family: str, modules: tuple[str, ...] = ()) -> Adapter:
    """A random adapter of a family."""
    return adapter_for(slot_of(card_of(tiny_base), family, modules))


def live(prepared: PreparedBase, adapter: Adapter, family: str = "lora", base_name: str = "") -> Live:
    """The live model of a float32 base."""
    model = load(prepared, compute_dtype="fp32").model
    plain = logits(model, [PROMPT])
    attached = families.get(family).attach(model, held(adapter), scaling=SCALING)
    families.get(family).load(attached, adapter)
    subject = Subject(adapter, SCALING, base_name or str(prepared.folder), prepared, family)
    return Live(subject, logits(attached.model, [PROMPT]), plain, greedy(attached.model, PROMPT, 8))


def held(adapter: Adapter) -> Slot:
    """A slot that holds an adapter and trains nothing."""
    return Slot({name: LayerSlot(d_out, d_in, rank, 0) for name, (d_out, d_in, rank) in adapter.sizes.items()})


def greedy(model: Any, tokens: Sequence[int], count: int) -> list[int]:
    """The most likely continuation, computed anew for every token."""
    known = list(tokens)
    for _ in range(count):
        known.append(int(np.argmax(logits(model, [known])[-1])))
    return known[len(tokens) :]
