"""The runtime's own format: adapters of every family, exactly as they are merged; `edge_runtime.lora.native` writes it.

Families that no other format has leave the house in it, and are read back into a model by `into_model`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import ExportError
from edge_runtime.lora.adapter import Adapter, LayerSlot, Slot
from edge_runtime.lora.native import Native, read_native_folder, write_native_folder
from export.checks import base_of
from export.subject import Engine, Subject

if TYPE_CHECKING:
    from edge_runtime.train.live import LiveModel


def export(adapter: Adapter, folder: Path, *, base_name: str, scaling: float) -> Path:
    """Write the adapter as a folder.

    Args:
        adapter: a personal or a global one, of any family.
        folder: created if absent; other files in it are left alone.
        base_name: hub id or path under which the reader finds the base model.
        scaling: lora_alpha / r, with which pairs were trained.

    Returns:
        The folder.

    Raises:
        ExportError: an adapter without any layer, or a folder that cannot be written.
    """
    write_native_folder(adapter, folder, base_name=base_name, scaling=scaling)
    return folder


def refuse(subject: Subject) -> None:
    """Find out whether there is anything to write.

    Raises:
        ExportError: an adapter without any direction or row.
    """
    if not any(subject.adapter.ranks.values()):
        raise ExportError("expected an adapter with at least one direction or row, found none; train it first")


def write(subject: Subject, folder: Path) -> None:
    """Write the adapter; raises as `export`."""
    export(subject.adapter, folder, base_name=subject.base_name, scaling=subject.scaling)


def open_engine(subject: Subject, folder: Path) -> Engine:
    """The adapter in a fresh live model of this runtime; it computes in float32.

    Raises:
        ExportError: there is no base model, or the folder cannot be read.
        BaseModelError: the base model cannot be loaded, or is another.
    """
    from export.torch_engine import TorchEngine, fresh_base  # noqa: PLC0415 - a server writes adapters, and has no torch

    return TorchEngine(into_model(fresh_base(base_of(subject)), read_native_folder(folder)).model)


def into_model(model: Any, found: Native) -> LiveModel:
    """A base model of transformers with the adapter in it, all of it frozen.

    Raises:
        BaseModelError: it belongs to another base.
    """
    from edge_runtime.train import mixed  # noqa: PLC0415 - a server writes adapters, and has no torch

    sizes = found.adapter.sizes
    slot = Slot({name: LayerSlot(d_out, d_in, rank, 0) for name, (d_out, d_in, rank) in sizes.items()})
    live = mixed.attach(model, slot, scaling=found.scaling)
    mixed.load_adapter(live, found.adapter)
    return live
