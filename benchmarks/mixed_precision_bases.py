"""The loss of SmolLM2 alone at each precision, and of nf4 with directions regained; texts are natural instructions.

Everything is as a device has it: prepared and loaded by `edge_runtime.train.base`, evaluated by its own loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from edge_runtime.lora.adapter import LayerSlot, Slot
from edge_runtime.train import data, evaluating, families
from edge_runtime.train.base import load, prepare

FILES, EACH = 12, 3
LENGTH = 192
NAME = "model.layers.0.self_attn.q_proj"


class Kept(NamedTuple):
    """How a base is kept: its precision, and directions regained."""

    precision: str
    regained: int = 0

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.precision}, {self.regained} regained" if self.regained else self.precision


KEPT = (Kept("bf16"), Kept("int8"), Kept("nf4"), Kept("nf4", 8), Kept("nf4", 16), Kept("nf4", 32))


def loss(kept: Kept, folder: Path, *, files: int = FILES) -> float:
    """Mean loss of completions, nats per token, of a base without any adapter.

    Args:
        kept: how it is kept.
        folder: of natural instructions.
        files: tasks that are looked at, some texts of each.
    """
    base = load(
        prepare("smollm2", precision=kept.precision, regained=kept.regained), compute_dtype="bf16", product_dtype="fp32"
    )
    paths = sorted(folder.glob("*.train.jsonl"))[:files]
    examples = [example for path in paths for example in data.load_examples(str(path))[:EACH]]
    tokens = data.tokenise_all(examples, base.tokenizer, LENGTH).examples
    # A direction of no effect: what is evaluated must be a live model.
    layer = base.model.get_submodule(NAME)
    slot = Slot({NAME: LayerSlot(layer.out_features, layer.in_features, 1, 1)})
    return evaluating.evaluate(families.get("lora").attach(base.model, slot, scaling=1.0), tokens).loss
