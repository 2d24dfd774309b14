"""Copy a fleet's state into one file while its server runs, and bring it back.

A backup is one consistent moment of the store: SQLite reads it within one transaction, and the server writes on
meanwhile. A restored fleet begins another life (`run`): devices may have been told "accepted" for updates that the
backup does not hold, so nothing that they remember of rounds counts any more. They hear the new life in the Directive,
forget what belonged to the former one, and train the open round again from the restored version. Updates that the
backup holds are merged once, and a device that trained one of them is told that it is stored already.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import sqlite3
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.database import BUSY_S, Lock, is_full
from edge_runtime.errors import ConfigError, DiskFullError
from server import schema
from server.store import FILE, LOCK

COMPANIONS = ("-wal", "-shm")
"""What SQLite keeps beside a database; of another database, they would spoil it."""


@dataclass(frozen=True)
class Summary:
    """What a backup holds.

    Attributes:
        phase: of the rounds; empty for a fleet that has not begun.
        round: the open or last one.
        version: of the global adapter.
        updates: accepted ones that it holds.
        size: bytes of the file.
    """

    phase: str
    round: int
    version: int
    updates: int
    size: int

    def __str__(self) -> str:
        """For people."""
        where = f"phase '{self.phase}', round {self.round}, version {self.version}" if self.phase else "not begun"
        return f"{where}, {self.updates} updates, {self.size} bytes"


def backup(folder: Path, out: Path) -> Summary:
    """Write the store in a folder, as it is at this moment, into one file; its server may run.

    The file is complete and checked, or it is not there: an older one of that name stays until then.

    Raises:
        ConfigError: no store there, or one that cannot be read or is damaged.
        DiskFullError: no room for it.
    """
    if not (folder / FILE).exists():
        raise ConfigError(f"a server's store was expected in {folder}; found none; check --store")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    _remove(part)
    try:
        # Not only for reading: after a server that was killed, whoever comes first brings SQLite's log back.
        with closing(_reader(folder / FILE, "rw")) as source, closing(sqlite3.connect(part)) as copy:
            source.backup(copy)  # all pages in one step: the server may write, and this copy stays of one moment
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, complete by itself
            found = _checked(copy, part)
        _flush(part)
        part.replace(out)
        _flush(out.parent)
    except (sqlite3.Error, OSError) as error:
        raise _trouble(error, f"the store in {folder} could not be copied to {out}") from error
    finally:
        _remove(part)
    return found


def restore(file: Path, folder: Path, *, replace: bool = False) -> Summary:
    """Make a folder's store what a backup holds, as another life of the fleet.

    Args:
        file: what `backup` wrote.
        folder: where a server will look for its store.
        replace: whether a store that is there may be replaced; it is kept beside, with the ending `.before-restore`.

    Raises:
        ConfigError: no backup, one that is damaged or of a newer version, a store that is there already, or a server
            that is using it.
        DiskFullError: no room for it.
    """
    if not file.is_file():
        raise ConfigError(f"a backup was expected at {file}; found none; check the path")
    store, part = folder / FILE, folder / (FILE + ".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with Lock(folder / LOCK):
            if store.exists() and not replace:
                raise ConfigError(
                    f"no store was expected in {folder}; found one; choose another --store, or say --replace to put "
                    "the backup in its place"
                )
            _remove(part)
            try:
                with closing(_reader(file, "ro")) as source, closing(sqlite3.connect(part)) as copy:
                    source.backup(copy)
                    copy.execute("PRAGMA journal_mode=DELETE")
                    _begin_anew(copy)
                    found = _checked(copy, file)
                _flush(part)
                _put_aside(store)
                part.replace(store)
                _flush(folder)
            finally:
                _remove(part)
    except (sqlite3.Error, OSError) as error:
        raise _trouble(error, f"{file} could not be restored into {folder}") from error
    return found


def _reader(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode={mode}", uri=True, timeout=BUSY_S)


def _checked(db: sqlite3.Connection, path: Path) -> Summary:
    """What a copy holds, once it is sure that it is whole.

    Raises:
        ConfigError: it is damaged, of a newer version, or no store.
    """
    [(verdict,), *_] = db.execute("PRAGMA integrity_check").fetchall()
    if verdict != "ok":
        raise ConfigError(f"a whole store was expected; the copy is damaged ({verdict}); use another backup")
    schema.check(db, int(db.execute("PRAGMA user_version").fetchone()[0]))
    try:
        row = db.execute("SELECT state FROM rounds").fetchone()
        [(updates,)] = db.execute("SELECT COUNT(*) FROM updates").fetchall()
    except sqlite3.OperationalError as error:
        raise ConfigError(f"a fleet's store was expected in {path}; {error}; check the path") from error
    state = json.loads(row[0]) if row else {}
    return Summary(
        state.get("phase", ""), state.get("round", 0), state.get("version", 0), int(updates), path.stat().st_size
    )


def _begin_anew(db: sqlite3.Connection) -> None:
    """Give the fleet in a copy another life: see the module's docstring."""
    row = db.execute("SELECT state FROM rounds").fetchone()
    if row is not None:
        state = {**json.loads(row[0]), "run": secrets.token_hex(8)}
        db.execute("UPDATE rounds SET state = ?", (json.dumps(state),))
    # Uploads under way belong to updates of the former life.
    db.execute("DELETE FROM chunks")
    db.execute("DELETE FROM offers")
    db.commit()


def _put_aside(store: Path) -> None:
    """Keep the store that is there under another name, with what SQLite keeps beside it."""
    for ending in ("", *COMPANIONS):
        here = store.with_name(store.name + ending)
        if here.exists():
            here.replace(here.with_name(f"{store.name}.before-restore{ending}"))


def _remove(part: Path) -> None:
    for ending in ("", "-journal", *COMPANIONS):
        part.with_name(part.name + ending).unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():  # some file systems know no such thing for a folder
            os.fsync(handle)
    finally:
        os.close(handle)


def _trouble(error: sqlite3.Error | OSError, what: str) -> ConfigError | DiskFullError:
    full = is_full(error) if isinstance(error, sqlite3.Error) else error.errno == errno.ENOSPC
    if full:
        return DiskFullError(f"{what}: no room ({error}); make room, or choose another disk")
    return ConfigError(f"{what} ({error}); check the path and its permissions")
