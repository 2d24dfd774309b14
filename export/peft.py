"""PEFT: a folder that `PeftModel.from_pretrained(base, folder)` loads.

Source of the format: PEFT's save format; `edge_runtime.lora.files` writes it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from edge_runtime.errors import ExportError, first_line, missing_extra
from edge_runtime.lora.adapter import Adapter, Matrix
from edge_runtime.lora.dense import is_dense, path_of, tensor_of
from edge_runtime.lora.files import write_peft_folder
from export import peft_ia3, peft_prompt
from export.checks import base_of
from export.subject import Engine, Subject
from profiles.light_import import light_import
from profiles.packaged import hub_name


class _Dense(NamedTuple):
    """A format of PEFT's for a family of tensors: which ones, how it is written and what it is called."""

    kinds: frozenset[str]
    write: Callable[[Adapter, Path, str], None]
    called: str


_DENSE = (
    _Dense(peft_ia3.KINDS, peft_ia3.write, "An (IA)³ adapter"),
    _Dense(peft_prompt.KINDS, peft_prompt.write, "A trained prompt"),
)
_MAGNITUDE = "magnitude"


def refuse(subject: Subject) -> None:
    """What PEFT has no format for.

    Raises:
        ExportError: an adapter without any direction, of a family that PEFT has no format for, or one that needs the
            base where there is none.
    """
    adapter = subject.adapter
    if not any(adapter.ranks.values()):
        raise ExportError("expected an adapter with at least one direction, found none; train it first")
    kinds = _kinds(adapter)
    if kinds - {_MAGNITUDE} and _form(kinds) is None:
        raise ExportError(
            f"PEFT has no format for tensors of this kind: {', '.join(sorted(kinds))}; export the adapter as native"
        )
    if _MAGNITUDE in kinds and subject.prepared is None:
        raise ExportError(
            "PEFT's format of DoRA has the base's own numbers in it; give the base with --base, "
            "or export the adapter as native"
        )


def write(subject: Subject, folder: Path) -> None:
    """Weights and configuration, each by an atomic rename; ranks may differ from layer to layer.

    Raises:
        ExportError: as `refuse`, or a folder that cannot be written.
    """
    refuse(subject)
    adapter, form = subject.adapter, _form(_kinds(subject.adapter))
    if form is not None:
        form.write(adapter, folder, hub_name(subject.base_name))
        return
    pairs = adapter.only(name for name in adapter if not is_dense(name))
    write_peft_folder(
        pairs, folder, base_name=hub_name(subject.base_name), scaling=subject.scaling, magnitudes=_magnitudes(subject)
    )


def open_engine(subject: Subject, folder: Path) -> Engine:
    """PEFT itself, with the folder on a fresh base.

    Raises:
        ExportError: PEFT cannot load it, or the subject has no base with it.
        MissingExtraError: PEFT is not installed.
    """
    from export.attached import fresh_base  # noqa: PLC0415 - a server writes, and has no torch
    from export.torch_engine import TorchEngine  # noqa: PLC0415 - as above

    try:
        # Lightly, and only here: training needs no PEFT, and should not have it in memory.
        peft = light_import("peft")
    except ImportError as error:
        raise missing_extra("peft", "client") from error
    base = fresh_base(base_of(subject))
    try:
        return TorchEngine(peft.PeftModel.from_pretrained(base, folder))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ExportError(f"expected PEFT to load '{folder}'; found: {first_line(error)}") from error


def _kinds(adapter: Adapter) -> set[str]:
    return {tensor_of(name) for name, rank in adapter.ranks.items() if rank and is_dense(name)}


def _form(kinds: set[str]) -> _Dense | None:
    return next((row for row in _DENSE if kinds and kinds <= row.kinds), None)


def _magnitudes(subject: Subject) -> dict[str, Matrix]:
    """Of DoRA, (d_out,) of each layer: the base's own, and what was learnt on top."""
    changed = {name: pair for name, pair in subject.adapter.items() if tensor_of(name) == _MAGNITUDE}
    if not changed:
        return {}
    from edge_runtime.train import mixed  # noqa: PLC0415 - a server writes, and has no torch
    from export.attached import attached, fresh_base  # noqa: PLC0415 - as above

    known = mixed.of_base(attached(fresh_base(base_of(subject)), subject.adapter, scaling=subject.scaling))
    return {path_of(name): (known[name] + pair.product())[0] for name, pair in changed.items()}
