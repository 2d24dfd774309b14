"""An adapter of any family as a folder: every layer as it is merged, for this project's own runtime to read.

`edge_adapter.safetensors` has the factors of each layer, `<layer>:a` and `<layer>:b`, bit for bit; `edge_adapter.json`
says for which base they are, and with which scale their pairs were trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from edge_runtime.errors import ExportError
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.files import write_folder

WEIGHTS = "edge_adapter.safetensors"
CONFIG = "edge_adapter.json"
FORMAT = 1


class Native(NamedTuple):
    """What such a folder holds."""

    adapter: Adapter
    base_name: str
    scaling: float


def write_native_folder(adapter: Adapter, folder: Path, *, base_name: str, scaling: float) -> None:
    """Write the adapter; weights first and the configuration last, each by an atomic rename.

    Raises:
        ExportError: an adapter without any layer, or a folder that cannot be written.
    """
    if not any(adapter.ranks.values()):
        raise ExportError("expected an adapter with at least one direction or row, found none; train it first")
    tensors = {
        f"{name}:{factor}": np.ascontiguousarray(values)
        for name, pair in adapter.items()
        for factor, values in (("a", pair.a), ("b", pair.b))
    }
    about = {"format": FORMAT, "base_model_name_or_path": base_name, "scaling": scaling}
    write_folder(folder, tensors, about, weights=WEIGHTS, about=CONFIG)


def is_native_folder(folder: Path) -> bool:
    """Whether an adapter lies there in this format."""
    return (folder / CONFIG).exists()


def read_native_folder(folder: Path) -> Native:
    """The adapter that `write_native_folder` wrote.

    Raises:
        ExportError: no such folder, or one that is damaged or of another format.
    """
    try:
        about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ExportError(f"'{folder}': expected format {FORMAT}, found {about['format']!r:.40}; export it again")
        tensors = load_file(folder / WEIGHTS)
        names = [key.removesuffix(":a") for key in tensors if key.endswith(":a")]
        layers = {name: Pair(tensors[f"{name}:a"], tensors[f"{name}:b"]) for name in names}
        return Native(Adapter(layers), str(about["base_model_name_or_path"]), float(about["scaling"]))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ExportError(f"'{folder}' holds no adapter that can be read ({error}); export it again") from error
