"""A prepared base as a checkpoint of plain weights, exactly those that the live model computes with, at any precision.

What is quantised is opened in float32, one layer when it is asked for. It is what an exported adapter is verified on
where the engine cannot read the prepared base itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edge_runtime.errors import missing_extra
from edge_runtime.train.base import PreparedBase, load
from edge_runtime.train.checkpoint import Checkpoint, open_folder
from edge_runtime.train.convert import precision_named
from edge_runtime.train.lora_linear import OPENERS, opened_weight

try:
    import torch
except ModuleNotFoundError as missing:
    raise missing_extra("torch", "client") from missing


def open_prepared(prepared: PreparedBase) -> Checkpoint:
    """The weights of a prepared base; rows of what is quantised come out as float32.

    Raises:
        BaseModelError: the base cannot be loaded.
    """
    stored = open_folder(prepared.folder)
    if precision_named(prepared.precision).quantise is None:
        return stored
    model = load(prepared, compute_dtype="fp32").model
    found = dict(_parameters(model))
    last: dict[str, torch.Tensor] = {}

    def rows(name: str, start: int, stop: int) -> torch.Tensor:
        if name not in last:
            last.clear()
            last[name] = _opened(model, name)
        return last[name][start:stop]

    config = {key: value for key, value in stored.config.items() if key != "quantization_config"}
    return Checkpoint(config, tuple(found), found.__getitem__, rows, stored.write_companions)


def _parameters(model: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name → shape, as a plain model has it; a 4-bit weight knows its own only in its state."""
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        yield name, tuple(parameter.shape if state is None else state.shape)


def _opened(model: Any, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf == "weight" and type(module).__name__ in OPENERS:
        return opened_weight(module)
    found: torch.Tensor = getattr(module, leaf).detach().float()
    return found
