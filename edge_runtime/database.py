"""A SQLite file that one process at a time may write: how it is opened, and what a full disk is called.

WAL with `synchronous=FULL`: what COMMIT returned from is on disk. The lock is a file of its own, held until the process
ends, so that others may still read the database: a backup is taken while its owner works.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import final

from edge_runtime.errors import DiskFullError

BUSY_S = 10.0
"""Seconds to wait for a reader that is about to finish."""


@final
class Lock:
    """The right to write in a folder; one process has it."""

    def __init__(self, path: Path) -> None:
        """Take it.

        Raises:
            OSError: another process has it, or the file cannot be made.
        """
        # Never removed: whoever waits for a file that is gone would hold a lock that nobody else can see.
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(self._file, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._file)
            raise OSError(f"process {owner} is using it") from error
        except OSError:
            os.close(self._file)
            raise
        with suppress(OSError):  # on a full disk the lock holds all the same; the number is for people
            os.truncate(self._file, 0)
            os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give it back."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def connect(path: Path, *, durable: bool = True) -> sqlite3.Connection:
    """Open, or create, a database for writing.

    Args:
        path: of the file.
        durable: whether COMMIT waits for the disk.

    Raises:
        sqlite3.Error: it cannot be opened, or is none.
    """
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(f"PRAGMA synchronous={'FULL' if durable else 'OFF'}")
    except sqlite3.Error:
        db.close()
        raise
    return db


@contextmanager
def transaction(db: sqlite3.Connection, where: object) -> Iterator[None]:
    """All that happens within it, or nothing.

    Raises:
        DiskFullError: there was no room; `where` tells people which disk.
    """
    try:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
            db.execute("COMMIT")
        except BaseException:
            # SQLite rolls back by itself when it has no room; a second time would be an error of its own.
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
    except sqlite3.OperationalError as error:
        if is_full(error):
            raise DiskFullError(f"no room on the disk of {where} ({error}); make room there") from error
        raise


def is_full(error: sqlite3.Error) -> bool:
    """Whether a write failed for want of room.

    SQLite says so itself, or, where the disk refuses a page of its shared memory or a sync, calls it an I/O error.
    """
    return any(sign in str(error) for sign in ("database or disk is full", "disk I/O error"))
