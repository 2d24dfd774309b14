"""An adapter in its base model, all of it held: what an exported artefact is compared with."""

from __future__ import annotations

from typing import Any

import torch

from edge_runtime.lora.adapter import Adapter, LayerSlot, Slot
from edge_runtime.train import mixed
from edge_runtime.train.base import PreparedBase, load
from edge_runtime.train.convert import precision_named
from edge_runtime.train.live import LiveModel


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


def fresh_base(prepared: PreparedBase) -> Any:
    """The base model alone, as narrow as its weights are stored: `in_float32` widens what it needs while it needs it.

    Raises:
        BaseModelError: it cannot be loaded.
    """
    # Computing in bfloat16 would round what float16 keeps of the embedding, which no later widening brings back.
    narrow = precision_named(prepared.precision).plain == torch.bfloat16
    return load(prepared, compute_dtype="bf16" if narrow else "fp32").model
