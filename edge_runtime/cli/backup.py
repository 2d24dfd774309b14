"""`edge-runtime backup` and `restore`: a fleet's whole state in one file, and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_runtime import config as settings
from edge_runtime.cli import shell
from server import backup as state


def backup(store: Path | None, out: Path, file: Path | None, overrides: Sequence[str]) -> int:
    """Write the backup and say what it holds."""
    folder = store or settings.load(file, overrides).server.store
    found = state.backup(folder, out)
    shell.logger("backup", as_json=False)(f"{folder} → {out}: {found}")
    return 0


def restore(
    backup_file: Path, store: Path | None, file: Path | None, overrides: Sequence[str], *, replace: bool
) -> int:
    """Put the backup in its place and say what happens next."""
    folder = store or settings.load(file, overrides).server.store
    found = state.restore(backup_file, folder, replace=replace)
    shell.logger("restore", as_json=False)(
        f"{backup_file} → {folder}: {found}; start the server: devices begin the open round again from there"
    )
    return 0
