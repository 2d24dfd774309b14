"""An adapter in its base model, all of it held: what an exported artefact is compared with, and what native folders are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from edge_runtime.lora.adapter import Adapter, LayerSlot, Slot
from edge_runtime.train import mixed
from edge_runtime.train.generate import answering
from edge_runtime.train.live import LiveModel
from export.subject import Logits


def attached(model: Any, adapter: Adapter, *, scaling: float) -> LiveModel:
    """A base model of transformers with an adapter of any family in it; the model is changed in place.

    Raises:
        BaseModelError: the adapter belongs to another base: a layer that this one lacks, or of another shape.
        ValueError: an adapter without any direction.
    """
    sizes = {name: size for name, size in adapter.sizes.items() if size[2]}
    slot = Slot({name: LayerSlot(d_out, d_in, rank, 0) for name, (d_out, d_in, rank) in sizes.items()})
    live = mixed.attach(model, slot, scaling=scaling)
    mixed.load_adapter(live, adapter.only(sizes))
    return live


def logits(model: Any, tokens: Sequence[int]) -> Logits:
    """The logits after every token of one prompt, in the precision that the model computes in.

    Args:
        model: a causal language model of transformers; its mode is left as it was.
        tokens: token ids.

    Returns:
        (len(tokens), vocabulary), float32.
    """
    device = model.get_input_embeddings().weight.device
    with answering(model) as causal:
        found: Logits = causal(input_ids=torch.tensor([list(tokens)], device=device)).logits[0].float().cpu().numpy()
    return found
