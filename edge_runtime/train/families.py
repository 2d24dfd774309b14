"""The table of adapter families: how each lives in a model, and how an Adapter enters and leaves it.

A family is a record of functions over a live model. Whoever attaches, loads or reads one goes through this record
and knows no family by name; the training loop needs only what every family promises: whatever is trainable requires
a gradient, and nothing else does. Adding a family is one module and one row.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, NamedTuple

import torch

from edge_runtime.errors import ConfigError, unknown_name
from edge_runtime.lora.adapter import Adapter
from edge_runtime.train import live, mixed
from edge_runtime.train.live import LiveModel


class Family(NamedTuple):
    """One kind of trainable adapter; the functions of `live` say what each argument means."""

    attach: Callable[..., LiveModel]
    """(base model, slot, *, scaling) → live model; the base model is changed in place."""
    detach: Callable[[LiveModel], Any]
    """Live model → the base model as it was."""
    without: Callable[[LiveModel], AbstractContextManager[Any]]
    """A context in which the base model computes alone."""
    load: Callable[..., None]
    """(live model, adapter, directions=None): write an adapter, in place."""
    read_trained: Callable[[LiveModel], Adapter]
    """The trained slice alone: what a device returns to the server."""
    read_all: Callable[[LiveModel], Adapter]
    """Everything held: the device's own adapter."""
    trainable: Callable[[LiveModel], dict[str, torch.nn.Parameter]]
    """The parameters that training changes, by name."""


def _of(module: ModuleType) -> Family:
    """The functions of `live` or `mixed`, which have the same names."""
    return Family(
        attach=module.attach,
        detach=module.detach,
        without=module.without_adapter,
        load=module.load_adapter,
        read_trained=module.read_trained,
        read_all=module.read_all,
        trainable=module.trainable_parameters,
    )


FAMILIES: dict[str, Family] = {
    "lora": _of(live),
    **dict.fromkeys(("bitfit", "bottleneck", "dora", "ia3", "layer_norm", "prefix", "prompt", "sparse"), _of(mixed)),
}
"""Pairs alone live in `live`, and everything else in `mixed`, which knows tensors by the names of layers."""


def get(name: str) -> Family:
    """The family of that name.

    Raises:
        ConfigError: no family of that name; lists those there are.
    """
    if name not in FAMILIES:
        raise ConfigError(unknown_name("family", name, FAMILIES))
    return FAMILIES[name]
