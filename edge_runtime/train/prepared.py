"""A prepared base: a folder with converted weights, configuration, tokenizer, and `base.json`, which vouches for them.

The folder can be copied to a device that has neither the original weights nor the memory to convert them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_runtime.errors import BaseModelError

MANIFEST = "base.json"
_LIBRARIES = ("torch", "transformers", "bitsandbytes", "safetensors", "gguf")

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]


class FileRecord(BaseModel):
    """One file as it was written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    """Bytes."""
    sha256: Digest


class Manifest(BaseModel):
    """What `base.json` says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: Digest
    """Of the base that was converted, whatever the precision it was converted to."""
    precision: str
    label: str
    """A name for people."""
    regained: Annotated[int, Field(ge=0)] = 0
    """Directions of what each quantised layer lost that lie beside the weights; see `regaining`."""
    files: Mapping[FileName, FileRecord]
    """Every file of the folder but `base.json` itself."""
    libraries: Mapping[str, str]
    """Versions of what converted it."""


def digest_of(path: Path) -> str:
    """SHA-256 (hex) of a file, read in pieces."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


def is_prepared(folder: Path) -> bool:
    """Whether a folder claims to be a prepared base; `check` finds out whether it is."""
    return (folder / MANIFEST).is_file()


def seal(folder: Path, *, fingerprint: str, precision: str, label: str, regained: int = 0) -> Manifest:
    """Write `base.json` for the files now in the folder; nothing may be added or changed afterwards."""
    files = {
        path.name: FileRecord(size=path.stat().st_size, sha256=digest_of(path)) for path in sorted(folder.iterdir())
    }
    libraries = {library: _version(library) for library in _LIBRARIES}
    manifest = Manifest(
        fingerprint=fingerprint, precision=precision, label=label, regained=regained, files=files, libraries=libraries
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """What `base.json` of a folder says.

    Raises:
        BaseModelError: it is missing or not what `seal` writes.
    """
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BaseModelError(f"expected a prepared base with {path}; found: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BaseModelError(f"expected {path} as it was written; found {where}: {first['msg']}") from error


def check(folder: Path) -> Manifest:
    """The manifest of a folder, after every file has been found to have the size and digest that it states.

    Raises:
        BaseModelError: a file is missing, or has another size or digest; names it.
    """
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise BaseModelError(f"expected the file {path}; found none")
        size = path.stat().st_size
        if size != record.size:
            raise BaseModelError(f"expected {path} to have {record.size} bytes; found {size}")
    for name, record in manifest.files.items():
        found = digest_of(folder / name)
        if found != record.sha256:
            raise BaseModelError(f"expected {folder / name} to have digest {record.sha256[:16]}…; found {found[:16]}…")
    return manifest


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        # `gguf` is needed for GGUF sources only, bitsandbytes for 4-bit bases only.
        return "not installed"
