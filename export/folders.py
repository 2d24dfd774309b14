"""Output folders that are whole or not there: written beside and renamed.

FOLDER               whole, and verified unless that was switched off
.FOLDER.part         under way, or left by a run that was killed; the next run replaces it
FOLDER.unverified    whole, but its engine could not be opened: not to be taken for good
FOLDER.refused       whole, and computes something else than the live model: to look into, not to use
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_runtime.errors import ExportError
from edge_runtime.train.exclusive import remove
from export import origin

MARKS = (origin.FILE, "adapter_config.json", "edge_adapter.json")
"""A folder with one of these is an export, and may be replaced."""


def check_free(folder: Path, *, force: bool) -> None:
    """Refuse to write where something is that shall stay.

    Raises:
        ExportError: it exists and `force` is not set, or is no export at all.
    """
    _recover(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir() or not any((folder / mark).exists() for mark in MARKS):
        raise ExportError(
            f"expected '{folder}' to be free or an earlier export; found something else; choose another --out"
        )
    if not force:
        raise ExportError(
            f"'{folder}' holds an earlier export; give --force to replace it once the new one is whole, "
            "or choose another --out"
        )


@contextmanager
def writing(folder: Path, *, force: bool) -> Iterator[Path]:
    """A fresh folder beside `folder`, which takes its place when the context ends well, and is gone when it does not.

    A folder that was moved away within the context stays where it is.

    Raises:
        ExportError: as `check_free`, or nothing can be written there.
    """
    check_free(folder, force=force)
    part = beside(folder, "part", hidden=True)
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        remove(part)
        part.mkdir()
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        yield part
        if part.exists():
            _place(part, folder)
    finally:
        remove(part)


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """An empty folder for the time being, with a name of its own: what a killed run left of it goes first."""
    folder = parent / ".logits"
    remove(folder)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        remove(folder)


def keep_as(part: Path, folder: Path, word: str) -> Path:
    """Move what was written to a name that says what is the matter with it; an older one of that name goes."""
    kept = beside(folder, word)
    remove(kept)
    part.replace(kept)
    return kept


def beside(folder: Path, word: str, *, hidden: bool = False) -> Path:
    """The name of a folder beside `folder`."""
    return folder.with_name(f"{'.' if hidden else ''}{folder.name}.{word}")


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _place(part: Path, folder: Path) -> None:
    """Put a whole folder in its place. A kill leaves the old one there, or beside (see `_recover`), or the new one."""
    old = beside(folder, "old", hidden=True)
    try:
        for path in part.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        remove(old)
        if folder.exists():
            folder.replace(old)
        part.replace(folder)
        remove(old)
    except OSError as error:
        raise unwritable(folder, error) from error


def _recover(folder: Path) -> None:
    """Bring back what a run had moved aside when it was killed."""
    old = beside(folder, "old", hidden=True)
    if not old.exists():
        return
    try:
        if folder.exists():
            remove(old)
        else:
            old.replace(folder)
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(folder: Path, error: OSError) -> ExportError:
    """The error for a folder that the system does not let us write."""
    return ExportError(f"cannot write '{folder}': {error}; choose a folder that can be written and has space")
