"""An adapter to begin with, for whoever trains without a fleet: which layers, at which rank, from which numbers.

In a fleet the server decides both; a person with a model of their own calls these two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from edge_runtime.errors import BaseModelError
from edge_runtime.lora.adapter import Adapter, LayerSlot, Slot
from edge_runtime.lora.algebra import refill, zero


def slot_for(model: Any, target_modules: Sequence[str], rank: int) -> Slot:
    """A slot that holds and trains `rank` directions of every layer named.

    Args:
        model: a torch model, before an adapter is attached; its layers may be quantised.
        target_modules: names of linear layers or ends of their module paths, as PEFT has them: "q_proj" names one
            layer of each block.
        rank: directions of each layer; fewer where the layer itself has fewer.

    Raises:
        BaseModelError: a name that fits no linear layer; lists the names there are.
        ValueError: no name, or a rank below 1.
    """
    if not target_modules or rank < 1:
        raise ValueError(f"a slot needs target modules and a rank of at least 1; found {target_modules!r} and {rank}")
    shapes = dict(_linear_layers(model))
    for target in target_modules:
        if not any(_fits(name, target) for name in shapes):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in shapes}))
            raise BaseModelError(f"no linear layer of the model fits target module '{target}'; it has: {known}")
    layers: dict[str, LayerSlot] = {}
    for name, (d_out, d_in) in shapes.items():
        if any(_fits(name, target) for target in target_modules):
            directions = min(rank, d_out, d_in)
            layers[name] = LayerSlot(d_out, d_in, held=directions, trained=directions)
    return Slot(layers)


def fresh_adapter(slot: Slot, seed: int = 0) -> Adapter:
    """An adapter of zero product that fits a slot: orthogonal rows of `a`, zero columns of `b`.

    Args:
        slot: what it must fit.
        seed: the same seed gives the same bytes, layer by layer, on every machine.
    """
    return Adapter(
        {
            name: refill(zero((layer.d_out, layer.d_in)), layer.held, f"{seed}:{name}")
            for name, layer in slot.layers.items()
            if layer.held
        }
    )


def _linear_layers(model: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    """Paths and (d_out, d_in); by attributes, since quantised layers are no subclass of torch's."""
    for name, module in model.named_modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            yield name, (int(module.out_features), int(module.in_features))


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
