"""Adapters of dense tensors, and of pairs beside them, on a live model: what `live` is to pairs alone.

The layers of the slot say what there is: `path#tensor` names a tensor of `dense_modules.KINDS`, any other name a
low-rank pair. So all families but LoRA are attached, loaded and read by the same functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from edge_runtime.errors import BaseModelError, unknown_name
from edge_runtime.lora.adapter import Adapter, LayerSlot, Matrix, Slot
from edge_runtime.lora.dense import is_dense, path_of, tensor_of
from edge_runtime.train import live as pairs
from edge_runtime.train.base import keep_gradients
from edge_runtime.train.dense_modules import KINDS
from edge_runtime.train.dense_tensor import DenseTensor
from edge_runtime.train.dora import Magnitude
from edge_runtime.train.live import LiveModel
from edge_runtime.train.virtual import Prefixed, Prompted, VirtualTokens


def attach(base: Any, slot: Slot, *, scaling: float) -> LiveModel:
    """Put the slot's tensors and pairs into a base model, all zero in effect; see `live.attach`.

    Raises:
        BaseModelError: a layer that the base model lacks, or of another shape, or a tensor of a kind that there is not.
        ValueError: as `live.attach`.
    """
    holding = {name: layer for name, layer in slot.layers.items() if layer.held}
    if not holding:
        raise ValueError("cannot attach a slot that holds no row of any tensor")
    for name, layer in holding.items():
        if is_dense(name):
            _check(base, name, layer)
    low_rank = Slot({name: layer for name, layer in slot.layers.items() if not is_dense(name)})
    if any(low_rank.held.values()):
        pairs.attach(base, low_rank, scaling=scaling)
    else:
        base.requires_grad_(False)
        keep_gradients(base)
    for name, layer in holding.items():
        if is_dense(name):
            module = base.get_submodule(path_of(name))
            tensor = DenseTensor(layer, module.weight.device)
            wrapper = KINDS[tensor_of(name)].wrap(module, tensor, name)
            pairs.exchange(base, path_of(name), wrapper.train(base.training))
            if tensor.a is not None:
                tensor.a.requires_grad_(True)
    live = LiveModel(base, slot, scaling, {name: tuple(range(rank)) for name, rank in slot.trained.items()})
    if known := _knowing(live):
        VirtualTokens(getattr(base, base.base_model_prefix), known)
    return live


def detach(live: LiveModel) -> Any:
    """Take everything out and return the base model as it was; the live model must not be used afterwards."""
    for wrapper in _knowing(live)[:1]:
        wrapper.virtual.remove()
    for name, wrapper in _wrappers(live).items():
        pairs.exchange(live.model, path_of(name), wrapper.base)
    return pairs.detach(_low_rank(live))


@contextmanager
def without_adapter(live: LiveModel) -> Iterator[Any]:
    """The base model alone, for as long as the context lasts; yields the model."""
    wrappers = _wrappers(live).values()
    with pairs.without_adapter(_low_rank(live)):
        for wrapper in wrappers:
            wrapper.enabled = False
        try:
            yield live.model
        finally:
            for wrapper in wrappers:
                wrapper.enabled = True


def at_once(live: LiveModel) -> AbstractContextManager[None]:
    """Let each pair multiply all its directions at once; see `live.at_once`."""
    return pairs.at_once(_low_rank(live))


def load_adapter(live: LiveModel, adapter: Adapter, directions: Mapping[str, Sequence[int]] | None = None) -> None:
    """Write an adapter into the live model, in place; see `live.load_adapter`.

    Raises:
        RoundError: layers, ranks, shapes or directions that do not fit the slot. Nothing is written then.
    """
    chosen = pairs.fitting(live.slot, adapter, directions)
    low_rank = _low_rank(live)
    if low_rank.slot.layers:
        pairs.load_adapter(low_rank, adapter.only(name for name in adapter if not is_dense(name)), chosen)
    for name, wrapper in _wrappers(live).items():
        wrapper.tensor.load(adapter[name], chosen.get(name, ()))
    live.directions = chosen


def read_trained(live: LiveModel) -> Adapter:
    """The trained slice alone, of the layers that have one, rows in the order trained."""
    trained = {name: wrapper.tensor.trained() for name, wrapper in _wrappers(live).items() if name in live.slot.trained}
    return Adapter({**pairs.read_trained(_low_rank(live)), **trained})


def read_all(live: LiveModel) -> Adapter:
    """All that is held, trained or not, as it was loaded: the device's own adapter."""
    held = {name: wrapper.tensor.whole() for name, wrapper in _wrappers(live).items()}
    return Adapter({**pairs.read_all(_low_rank(live)), **held})


def trainable_parameters(live: LiveModel) -> dict[str, torch.nn.Parameter]:
    """The parameters that training changes, float32; of a tensor `<layer>.a` (r, w), of a pair also `<layer>.b`."""
    found = pairs.trainable_parameters(_low_rank(live))
    for name, wrapper in _wrappers(live).items():
        if wrapper.tensor.a is not None:
            found[f"{name}.a"] = wrapper.tensor.a
    return found


def of_base(live: LiveModel) -> dict[str, Matrix]:
    """Layer → (1, d_out), the magnitudes of rows that the base itself has, of those that a tensor changes."""
    return {
        name: wrapper.norms.cpu().numpy().reshape(1, -1)
        for name, wrapper in _wrappers(live).items()
        if isinstance(wrapper, Magnitude)
    }


def _wrappers(live: LiveModel) -> dict[str, Any]:
    return {
        name: live.model.get_submodule(path_of(name))
        for name, layer in live.slot.layers.items()
        if layer.held and is_dense(name)
    }


def _knowing(live: LiveModel) -> list[Any]:
    """The wrappers that know of virtual tokens."""
    return [wrapper for wrapper in _wrappers(live).values() if isinstance(wrapper, Prompted | Prefixed)]


def _low_rank(live: LiveModel) -> LiveModel:
    """The pairs alone, as `live` knows them."""
    slot = Slot({name: layer for name, layer in live.slot.layers.items() if not is_dense(name)})
    return LiveModel(live.model, slot, live.scaling, {name: live.directions[name] for name in slot.trained})


def _check(base: Any, name: str, layer: LayerSlot) -> None:
    modules, kind = dict(base.named_modules()), tensor_of(name)
    if kind not in KINDS:
        raise BaseModelError(unknown_name("kind of tensor", kind, KINDS) + "; update this device")
    if path_of(name) not in modules:
        raise BaseModelError(
            f"the base model has no layer '{path_of(name)}'; expected the layers of the fleet's base model"
        )
    width = KINDS[kind].width(modules[path_of(name)])
    if width != layer.d_in:
        raise BaseModelError(
            f"layer '{name}': the slot expects rows of {layer.d_in} numbers, the base model needs {width}; "
            "use the fleet's base model"
        )
