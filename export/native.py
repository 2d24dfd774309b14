"""The runtime's own format: adapters of every family, exactly as they are merged; `edge_runtime.lora.native` writes it.

Families that no other format has leave the house in it, and are read back into a model by `open_engine`.
"""

from __future__ import annotations

from pathlib import Path

from edge_runtime.errors import ExportError
from edge_runtime.lora.native import read_native_folder, write_native_folder
from export.checks import base_of
from export.subject import Engine, Subject


def refuse(subject: Subject) -> None:
    """It holds every adapter that has anything in it.

    Raises:
        ExportError: an adapter without any direction or row.
    """
    if not any(subject.adapter.ranks.values()):
        raise ExportError("expected an adapter with at least one direction or row, found none; train it first")


def write(subject: Subject, folder: Path) -> None:
    """Write the adapter into a folder; other files in it are left alone.

    Raises:
        ExportError: an adapter without any layer, or a folder that cannot be written.
    """
    refuse(subject)
    write_native_folder(subject.adapter, folder, base_name=subject.base_name, scaling=subject.scaling)


def open_engine(subject: Subject, folder: Path) -> Engine:
    """The base with the adapter of the folder in it.

    Raises:
        BaseModelError: the adapter belongs to another base, or there is none to open it on.
        ExportError: the folder is damaged.
    """
    from export.attached import attached, fresh_base  # noqa: PLC0415 - a server writes, and has no torch
    from export.torch_engine import TorchEngine  # noqa: PLC0415 - as above

    found = read_native_folder(folder)
    model = fresh_base(base_of(subject))
    attached(model, found.adapter, scaling=found.scaling)
    return TorchEngine(model)
