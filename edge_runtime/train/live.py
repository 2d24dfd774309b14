"""LoRA on a live model: the slice that is trained and the rest that is held, as two adapters of PEFT.

A device holds the global adapter up to some rank and trains a few of its directions. PEFT computes both in every
forward pass, as the adapters `trained` (float32, with gradients) and `held` (frozen, any precision); together they are
one adapter whose rows were dealt into two hands. At the border to numpy the scale is folded into `b` and the rows
return to their order: `read_all` after `load_adapter` gives back what was loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import BaseModelError, RoundError, missing_extra
from edge_runtime.lora.adapter import Adapter, LayerSlot, Matrix, Pair, Slot
from edge_runtime.lora.files import lora_settings
from edge_runtime.train.base import keep_gradients
from edge_runtime.train.quiet import quiet

try:
    import torch

    # PEFT imports bitsandbytes, which advises to install a library that fetches code from the hub.
    with quiet():
        from peft import LoraConfig, PeftModel
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "peft", "client") from missing

TRAINED = "trained"
HELD = "held"


@dataclass(eq=False)
class LiveModel:
    """A base model with the device's adapter in it. Not frozen: it stands for weights that change in place.

    Attributes:
        model: the PeftModel.
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
        base: a causal language model of transformers, its layers quantised or not. It is changed in place, and
            all of it is frozen; `detach` undoes it.
        slot: layers by module path in `base`. Layers that hold nothing are left untouched.
        scaling: PEFT's lora_alpha / r. A power of two makes folding it exact.
        held_dtype: what frozen directions are kept in; bfloat16 halves them and rounds what `read_all` returns.

    Raises:
        BaseModelError: a layer that the base model lacks, or of another shape.
        ValueError: a slot that holds nothing, or a scale that is not a positive number.
    """
    _check_layers(base, slot)
    ranks = {TRAINED: slot.trained, HELD: {n: s.held - s.trained for n, s in slot.layers.items() if s.held > s.trained}}
    if not any(ranks.values()):
        raise ValueError("cannot attach a slot that holds no direction of any layer")
    model: Any = None
    for adapter, by_layer in ranks.items():
        if by_layer:
            # Dropout would make a round depend on more than its data and its seed.
            config = LoraConfig(**asdict(lora_settings(by_layer, scaling)), lora_dropout=0.0, task_type="CAUSAL_LM")
            if model is None:
                model = PeftModel(base, config, adapter_name=adapter)
            else:
                model.add_adapter(adapter, config)
    live = LiveModel(model, slot, scaling, {name: tuple(range(rank)) for name, rank in slot.trained.items()})
    _check_targets(live, ranks)
    model.base_model.set_adapter([adapter for adapter, by_layer in ranks.items() if by_layer])
    _set_precision(live, held_dtype)
    _freeze_all_but_trained(live)
    keep_gradients(live.model)
    return live


def detach(live: LiveModel) -> Any:
    """Take the adapter out and return the base model as it was; the live model must not be used afterwards."""
    return live.model.unload()


@contextmanager
def without_adapter(live: LiveModel) -> Iterator[Any]:
    """The base model alone, for as long as the context lasts; yields the model."""
    try:
        with live.model.disable_adapter():
            yield live.model
    finally:
        # PEFT asks for gradients of every active adapter when it enables them again, the held one among them.
        _freeze_all_but_trained(live)


def load_adapter(live: LiveModel, adapter: Adapter, directions: Mapping[str, Sequence[int]] | None = None) -> None:
    """Write an adapter into the live model, in place.

    Args:
        live: as `attach` returned it.
        adapter: every layer of the slot that holds anything, at exactly the rank held; no other layer.
        directions: for each layer, which of its rows are trained; the first ones where a layer is not named.

    Raises:
        RoundError: layers, ranks, shapes or directions that do not fit the slot. Nothing is written then.
    """
    holding = {name: layer for name, layer in live.slot.layers.items() if layer.held}
    if adapter.keys() != holding.keys():
        raise RoundError(f"the adapter does not fit this device's slot: {_difference(set(holding), set(adapter))}")
    chosen: dict[str, tuple[int, ...]] = {}
    for name, layer in holding.items():
        _check_pair(name, adapter[name], layer)
        if layer.trained:
            chosen[name] = tuple((directions or {}).get(name, range(layer.trained)))
            _check_directions(name, chosen[name], layer)
    for name, pair in adapter.items():
        rows = chosen.get(name, ())
        _write(live, name, TRAINED, pair, rows)
        _write(live, name, HELD, pair, _others(rows, pair.rank))
    live.directions = chosen


def read_trained(live: LiveModel) -> Adapter:
    """The trained slice alone, of the layers that have one: a (r, d_in), b (d_out, r), rows in the order trained."""
    return Adapter({name: _read(live, name, TRAINED) for name in live.slot.trained})


def read_all(live: LiveModel) -> Adapter:
    """All that is held, trained or not, rows in the order in which they were loaded: the device's own adapter."""
    layers: dict[str, Pair] = {}
    for name, layer in live.slot.layers.items():
        if layer.held:
            rows = live.directions.get(name, ())
            order = np.argsort(np.asarray(rows + _others(rows, layer.held)))
            parts = [_read(live, name, adapter) for adapter in (TRAINED, HELD) if adapter in _module(live, name).lora_A]
            a = np.concatenate([part.a for part in parts])[order]
            b = np.concatenate([part.b for part in parts], axis=1)[:, order]
            layers[name] = Pair(a, np.ascontiguousarray(b))
    return Adapter(layers)


def trainable_parameters(live: LiveModel) -> dict[str, torch.nn.Parameter]:
    """The parameters that training changes, float32, by `<layer>.a` (r, d_in) and `<layer>.b` (d_out, r)."""
    found: dict[str, torch.nn.Parameter] = {}
    for name in live.slot.trained:
        module = _module(live, name)
        found[f"{name}.a"] = module.lora_A[TRAINED].weight
        found[f"{name}.b"] = module.lora_B[TRAINED].weight
    return found


def _module(live: LiveModel, name: str) -> Any:
    return live.model.get_base_model().get_submodule(name)


def _others(rows: Sequence[int], rank: int) -> tuple[int, ...]:
    taken = set(rows)
    return tuple(row for row in range(rank) if row not in taken)


def _write(live: LiveModel, name: str, adapter: str, pair: Pair, rows: Sequence[int]) -> None:
    if not rows:
        return
    index, module = list(rows), _module(live, name)
    _copy(module.lora_A[adapter].weight, pair.a[index])
    _copy(module.lora_B[adapter].weight, pair.b[:, index] / np.float32(live.scaling))


def _copy(parameter: torch.nn.Parameter, values: NDArray[np.float32]) -> None:
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(values)))


def _read(live: LiveModel, name: str, adapter: str) -> Pair:
    module = _module(live, name)
    b = _numpy(module.lora_B[adapter].weight) * np.float32(live.scaling)
    return Pair(_numpy(module.lora_A[adapter].weight), b)


def _numpy(parameter: torch.nn.Parameter) -> Matrix:
    # A copy: the values must not follow the parameter through the steps to come.
    return np.array(parameter.detach().to("cpu", torch.float32).numpy(), copy=True)


def _set_precision(live: LiveModel, held_dtype: torch.dtype) -> None:
    for name, layer in live.slot.layers.items():
        if layer.held:
            module = _module(live, name)
            for adapter in module.lora_A:
                dtype = torch.float32 if adapter == TRAINED else held_dtype
                module.lora_A[adapter].to(dtype)
                module.lora_B[adapter].to(dtype)


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


def _check_targets(live: LiveModel, ranks: Mapping[str, Mapping[str, int]]) -> None:
    """PEFT matches layers by pattern; make sure that it found those meant, at the ranks meant, and no other."""
    wanted = {(name, adapter): rank for adapter, by_layer in ranks.items() for name, rank in by_layer.items()}
    found = {
        (name, adapter): linear.out_features
        for name, module in live.model.get_base_model().named_modules()
        if hasattr(module, "lora_A")
        for adapter, linear in module.lora_A.items()
    }
    if wanted != found:
        different = sorted(name for (name, _), _ in wanted.items() ^ found.items())
        raise BaseModelError(f"PEFT adapted other layers or ranks than the slot asks for: {', '.join(different)}")


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
