"""LoRA on a live model: the slice that is trained and the rest that is held, in the place of each adapted layer.

A device holds the global adapter up to some rank and trains a few of its directions. `LoraLinear` computes both in
every forward pass, `trained` (float32, with gradients) and `held` (frozen, any precision); together they are one
adapter whose rows were dealt into two hands. At the border to numpy the scale is folded into `b` and the rows
return to their order: `read_all` after `load_adapter` gives back what was loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import BaseModelError, RoundError, missing_extra
from edge_runtime.lora.adapter import Adapter, LayerSlot, Matrix, Pair, Slot
from edge_runtime.train.base import keep_gradients
from edge_runtime.train.lora_linear import LoraLinear

try:
    import torch
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "torch", "client") from missing

Factors = tuple[torch.nn.Parameter, torch.nn.Parameter]

TRAINED = "trained"
HELD = "held"


@dataclass(eq=False)
class LiveModel:
    """A base model with the device's adapter in it. Not frozen: it stands for weights that change in place.

    Attributes:
        model: the base model of transformers, with a `LoraLinear` in the place of every layer that holds anything.
        slot: how many directions of which layer are held and trained.
        scaling: PEFT's lora_alpha / r, the same for every layer and rank.
        directions: for each layer with trained directions, which of its held rows they are, in the order trained.
    """

    model: Any
    slot: Slot
    scaling: float
    directions: dict[str, tuple[int, ...]]


def attach(base: Any, slot: Slot, *, scaling: float, held_dtype: torch.dtype = torch.float32) -> LiveModel:
    """Put the slot's directions into a base model, all zero in effect until an adapter is loaded.

    Args:
        base: a model of transformers, its layers quantised or not. It is changed in place, and all of it is frozen;
            `detach` undoes it.
        slot: layers by module path in `base`. Layers that hold nothing are left untouched.
        scaling: PEFT's lora_alpha / r. A power of two makes folding it exact.
        held_dtype: what frozen directions are kept in; bfloat16 halves them and rounds what `read_all` returns.

    Raises:
        BaseModelError: a layer that the base model lacks, or of another shape.
        ValueError: a slot that holds nothing, or a scale that is not a positive number.
    """
    if not scaling > 0 or not math.isfinite(scaling):
        raise ValueError(f"expected a positive scale; found {scaling}")
    _check_layers(base, slot)
    holding = {name: layer for name, layer in slot.layers.items() if layer.held}
    if not holding:
        raise ValueError("cannot attach a slot that holds no direction of any layer")
    for name, layer in holding.items():
        beside = LoraLinear(
            base.get_submodule(name),
            trained=layer.trained,
            held=layer.held - layer.trained,
            scaling=scaling,
            held_dtype=held_dtype,
        )
        exchange(base, name, beside.train(base.training))
    live = LiveModel(base, slot, scaling, {name: tuple(range(rank)) for name, rank in slot.trained.items()})
    _freeze_all_but_trained(live)
    keep_gradients(base)
    return live


def detach(live: LiveModel) -> Any:
    """Take the adapter out and return the base model as it was; the live model must not be used afterwards."""
    for name, module in _adapted(live).items():
        exchange(live.model, name, module.base)
    return live.model


@contextmanager
def without_adapter(live: LiveModel) -> Iterator[Any]:
    """The base model alone, for as long as the context lasts; yields the model."""
    modules = _adapted(live).values()
    for module in modules:
        module.enabled = False
    try:
        yield live.model
    finally:
        for module in modules:
            module.enabled = True


@contextmanager
def at_once(live: LiveModel) -> Iterator[None]:
    """Let each layer multiply all its directions at once, in the order in which they were loaded.

    As whoever reads the adapter afterwards does: two products, of those trained and of those held, round otherwise.
    """
    modules = {name: module for name, module in _adapted(live).items() if live.slot.layers[name].trained}
    for name, module in modules.items():
        module.order = torch.from_numpy(_order(live, name)).to(module.weight.device)
    try:
        yield
    finally:
        for module in modules.values():
            module.order = None


def load_adapter(live: LiveModel, adapter: Adapter, directions: Mapping[str, Sequence[int]] | None = None) -> None:
    """Write an adapter into the live model, in place.

    Args:
        live: as `attach` returned it.
        adapter: every layer of the slot that holds anything, at exactly the rank held; no other layer.
        directions: for each layer, which of its rows are trained; the first ones where a layer is not named.

    Raises:
        RoundError: layers, ranks, shapes or directions that do not fit the slot. Nothing is written then.
    """
    chosen = fitting(live.slot, adapter, directions)
    for name, pair in adapter.items():
        rows = chosen.get(name, ())
        _write(live, name, TRAINED, pair, rows)
        _write(live, name, HELD, pair, _others(rows, pair.rank))
    live.directions = chosen


def fitting(slot: Slot, adapter: Adapter, directions: Mapping[str, Sequence[int]] | None) -> dict[str, tuple[int, ...]]:
    """Layer → rows to train, of an adapter that fits a slot; the first ones where a layer is not named.

    Raises:
        RoundError: layers, ranks, shapes or directions that do not fit.
    """
    holding = {name: layer for name, layer in slot.layers.items() if layer.held}
    if adapter.keys() != holding.keys():
        raise RoundError(f"the adapter does not fit this device's slot: {_difference(set(holding), set(adapter))}")
    chosen: dict[str, tuple[int, ...]] = {}
    for name, layer in holding.items():
        _check_pair(name, adapter[name], layer)
        if layer.trained:
            chosen[name] = tuple((directions or {}).get(name, range(layer.trained)))
            _check_directions(name, chosen[name], layer)
    return chosen


def read_trained(live: LiveModel) -> Adapter:
    """The trained slice alone, of the layers that have one: a (r, d_in), b (d_out, r), rows in the order trained."""
    return Adapter({name: _read(live, name, TRAINED) for name in live.slot.trained})


def read_all(live: LiveModel) -> Adapter:
    """All that is held, trained or not, rows in the order in which they were loaded: the device's own adapter."""
    layers: dict[str, Pair] = {}
    for name, layer in live.slot.layers.items():
        if layer.held:
            order = _order(live, name)
            parts = [_read(live, name, hand) for hand in (TRAINED, HELD) if _factors(live, name, hand) is not None]
            a = np.concatenate([part.a for part in parts])[order]
            b = np.concatenate([part.b for part in parts], axis=1)[:, order]
            layers[name] = Pair(a, np.ascontiguousarray(b))
    return Adapter(layers)


def trainable_parameters(live: LiveModel) -> dict[str, torch.nn.Parameter]:
    """The parameters that training changes, float32, by `<layer>.a` (r, d_in) and `<layer>.b` (d_out, r)."""
    found: dict[str, torch.nn.Parameter] = {}
    for name in live.slot.trained:
        found[f"{name}.a"], found[f"{name}.b"] = _present(live, name, TRAINED)
    return found


def _adapted(live: LiveModel) -> dict[str, LoraLinear]:
    return {name: live.model.get_submodule(name) for name, layer in live.slot.layers.items() if layer.held}


def exchange(model: Any, name: str, module: torch.nn.Module) -> None:
    """Put a module in the place of the one at that path."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _factors(live: LiveModel, name: str, hand: str) -> Factors | None:
    """(a, b) of one hand of a layer; None where it is empty."""
    module = live.model.get_submodule(name)
    a, b = (module.a, module.b) if hand == TRAINED else (module.held_a, module.held_b)
    return None if a is None else (a, b)


def _present(live: LiveModel, name: str, hand: str) -> Factors:
    factors = _factors(live, name, hand)
    if factors is None:
        raise RoundError(f"layer '{name}': expected {hand} directions, found none; its slot and its model differ")
    return factors


def _order(live: LiveModel, name: str) -> NDArray[np.intp]:
    """Where each direction of a layer, in the order in which they were loaded, is among those trained and held."""
    rows = live.directions.get(name, ())
    return np.argsort(np.asarray(rows + _others(rows, live.slot.layers[name].held)))


def _others(rows: Sequence[int], rank: int) -> tuple[int, ...]:
    taken = set(rows)
    return tuple(row for row in range(rank) if row not in taken)


def _write(live: LiveModel, name: str, hand: str, pair: Pair, rows: Sequence[int]) -> None:
    if not rows:
        return
    index, (a, b) = list(rows), _present(live, name, hand)
    _copy(a, pair.a[index])
    _copy(b, pair.b[:, index] / np.float32(live.scaling))


def _copy(parameter: torch.nn.Parameter, values: NDArray[np.float32]) -> None:
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(values)))


def _read(live: LiveModel, name: str, hand: str) -> Pair:
    a, b = _present(live, name, hand)
    return Pair(_numpy(a), _numpy(b) * np.float32(live.scaling))


def _numpy(parameter: torch.nn.Parameter) -> Matrix:
    # A copy: the values must not follow the parameter through the steps to come.
    return np.array(parameter.detach().to("cpu", torch.float32).numpy(), copy=True)


def _freeze_all_but_trained(live: LiveModel) -> None:
    live.model.requires_grad_(False)
    for parameter in trainable_parameters(live).values():
        parameter.requires_grad_(True)


def _check_layers(base: Any, slot: Slot) -> None:
    modules = dict(base.named_modules())
    for name, layer in slot.layers.items():
        if name not in modules:
            raise BaseModelError(f"the base model has no layer '{name}'; expected the layers of the fleet's base model")
        found = getattr(modules[name], "out_features", None), getattr(modules[name], "in_features", None)
        if found != (layer.d_out, layer.d_in):
            raise BaseModelError(
                f"layer '{name}': the slot expects (d_out, d_in) = {(layer.d_out, layer.d_in)}, the base model has "
                f"{found}; use the fleet's base model"
            )


def _check_pair(name: str, pair: Pair, layer: LayerSlot) -> None:
    if pair.shape != (layer.d_out, layer.d_in) or pair.rank != layer.held:
        raise RoundError(
            f"layer '{name}': expected shape {(layer.d_out, layer.d_in)} at rank {layer.held}, "
            f"found {pair.shape} at rank {pair.rank}"
        )


def _check_directions(name: str, rows: Sequence[int], layer: LayerSlot) -> None:
    if len(rows) != layer.trained or len(set(rows)) != len(rows) or not all(0 <= row < layer.held for row in rows):
        raise RoundError(
            f"layer '{name}': expected {layer.trained} different directions out of {layer.held}, found {tuple(rows)}"
        )


def _difference(expected: set[str], found: set[str]) -> str:
    missing, extra = sorted(expected - found), sorted(found - expected)
    return "; ".join(f"{kind} {', '.join(names)}" for kind, names in (("lacks", missing), ("has also", extra)) if names)
