"""Adapters that lie in folders, PEFT's or ours, with what is known of where they come from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import ExportError
from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.dense import is_dense, tensor_of
from edge_runtime.lora.files import CONFIG, read_peft_folder
from edge_runtime.lora.native import is_native_folder, read_native_folder
from export import origin
from export.origin import Origin
from profiles.families import FAMILIES
from profiles.packaged import ALIASES

_MODULES = ("q_proj", "down_proj")
"""One of which outputs are scaled and one of which inputs are: together they show all that a family can add."""


@dataclass(frozen=True, eq=False)
class Leaving:
    """An adapter that was found, and what is known of it.

    Attributes:
        adapter: the scale is folded into b.
        scaling: PEFT's lora_alpha / r.
        base: what its files say that the base model is; '' where they do not.
        origin: where it comes from, as far as anybody wrote it down.
    """

    adapter: Adapter
    scaling: float
    base: str
    origin: Origin


def read(folder: Path) -> Leaving:
    """The adapter of a folder: of ours if there is one in it, since it holds every family; else PEFT's.

    Raises:
        ExportError: neither, damaged files, or a kind of adapter of PEFT's that is more than LoRA.
    """
    known = origin.read(folder)
    if is_native_folder(folder):
        found = read_native_folder(folder)
        adapter, scaling, base = found.adapter, found.scaling, found.base_name
    else:
        adapter = read_peft_folder(folder)
        base, scaling = _told(folder / CONFIG)
    about = known or Origin(base=base_named(base), family=family_of(adapter))
    return Leaving(adapter, scaling, base, about)


def family_of(adapter: Adapter) -> str:
    """The family whose pieces an adapter's layers are.

    Raises:
        ExportError: no family has such tensors together.
    """
    kinds = {tensor_of(name) if is_dense(name) else "" for name, rank in adapter.ranks.items() if rank}
    for name, family in FAMILIES.items():
        pieces = {piece.tensor for module in _MODULES for piece in family.pieces(module, 1, 1)}
        if kinds and kinds <= pieces and ("" in kinds) == ("" in pieces):
            return name
    raise ExportError(
        f"expected the layers of one family of {', '.join(FAMILIES)}; found {sorted(kinds) or 'none'}; "
        "train an adapter first"
    )


def base_spec(about: Origin | None, told: str) -> str:
    """The base model of an adapter in a word that `--base` would take; '' where nobody says which.

    Args:
        about: where it comes from.
        told: what its own configuration says.
    """
    known = about.base if about is not None else ""
    # What was written as a name is taken as one, never as a path that happens to be here.
    return known if known in ALIASES or "/" in known else told


def base_named(base: str) -> str:
    """What others may read of a base's name: of a path on this machine, its last part."""
    return Path(base).name if Path(base).is_absolute() or Path(base).exists() else base


def _told(path: Path) -> tuple[str, float]:
    """The base model that PEFT's configuration names, and the scale of most layers; it was read before."""
    config = json.loads(path.read_text(encoding="utf-8"))
    rank, alpha = float(config.get("r") or 1), float(config.get("lora_alpha") or 1)
    scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return str(config.get("base_model_name_or_path") or ""), scaling
