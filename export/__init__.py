"""How an adapter leaves the house: one file, one format.

A format is a row of a literal table; adding one is one module and one row.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from edge_runtime.errors import ConfigError, unknown_name
from export import native, peft


class Format(NamedTuple):
    """One way of leaving."""

    write: Callable[..., Path]
    """(adapter, folder, *, base_name, scaling) → the folder or file that was written."""
    readers: str
    """Who reads it, for people."""


FORMATS: dict[str, Format] = {
    "peft": Format(peft.export, "PEFT, transformers, vLLM and whatever else reads adapter_model.safetensors"),
    "native": Format(native.export, "this runtime, for adapters of every family"),
}


def get(name: str) -> Format:
    """The format of that name.

    Raises:
        ConfigError: no format of that name; lists those there are.
    """
    if name not in FORMATS:
        raise ConfigError(unknown_name("export format", name, FORMATS))
    return FORMATS[name]
