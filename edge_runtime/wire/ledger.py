"""What must never go backwards: the counter of one's own messages, and the highest ones taken from others.

One SQLite file. It lies beside the key that it belongs to and not with the state, so that neither deleting a device's
state nor restoring a server's store from a backup turns it back.

A number to sign with is the clock's microseconds since 1970, or the one after the last, whichever is higher. So a
ledger that was lost or restored still counts on from where it was, unless the clock was set back as well, and a device
that goes on after another one used its key is not old for ever; with the ledger there, the clock may do what it likes.
Numbers are reserved in blocks of about a minute, each written and synced before its first number is used: a crash skips
numbers and never uses one again. On a full disk the rest of a block is used up without the clock.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from edge_runtime.database import transaction
from edge_runtime.errors import ConfigError, DiskFullError
from edge_runtime.wire.signing import MAX_COUNTER

BLOCK = 1 << 26
"""Numbers, and microseconds: 67 seconds."""

CREDIBLE = 1 << 52
"""Microseconds; a clock beyond it (the year 2112) is wrong, and would use up the numbers."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS reserved (one INTEGER PRIMARY KEY CHECK (one = 1), upto INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS taken    (key TEXT, kind TEXT, counter INTEGER NOT NULL, PRIMARY KEY (key, kind));
"""


def microseconds() -> int:
    """The clock: microseconds since 1970."""
    return time.time_ns() // 1000


class Ledger:
    """The counters of one end. One process opens it at a time; a second one is refused.

    Args:
        path: the file; made if missing.
        clock: microseconds since 1970; may be wrong.

    Raises:
        ConfigError: the file cannot be used, or another process uses it.
    """

    def __init__(self, path: Path, clock: Callable[[], int] = microseconds) -> None:
        self._clock, self._path = clock, path
        self._next = self._end = 0
        self._unsaved: dict[tuple[str, str], int] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=2.0, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            # Two processes with one key would refuse each other's messages as old.
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA.split(";"):
                self._db.execute(statement)
            self._db.execute("COMMIT")
            rows = self._db.execute("SELECT key, kind, counter FROM taken")
            self._taken = {(str(key), str(kind)): int(counter) for key, kind, counter in rows}
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"the counters of signed messages were expected in {path}, which cannot be used ({error}); "
                "stop the other process with this key, or name another file in security.ledger"
            ) from error

    def draw(self) -> int:
        """The next number to sign with; none comes twice, whatever happens.

        Raises:
            DiskFullError: no room to reserve the first block, or another one when all numbers of the last are used.
            ConfigError: the numbers have come to their end.
        """
        clock = self._clock()
        now = clock if 0 <= clock < CREDIBLE else 0
        if self._next >= self._end:
            self._reserve(now)
        elif now >= self._end:
            with suppress(DiskFullError):  # the block has other numbers
                self._reserve(now)
        number = max(self._next, now) if now < self._end else self._next
        self._next = number + 1
        return number

    def highest(self, key: str, kind: str) -> int:
        """The highest counter taken from a key on a kind of topic; -1 for none."""
        return self._taken.get((key, kind), -1)

    def take(self, key: str, kind: str, counter: int) -> None:
        """Remember a counter, if it is higher.

        Survives a killed process; a power failure may cost the last ones. On a full disk it is written down with the
        next one that there is room for.
        """
        if counter <= self.highest(key, kind):
            return
        self._taken[key, kind] = self._unsaved[key, kind] = counter
        # Without a sync: what a power failure forgets was taken, and whoever repeats it finds that it has no effect.
        self._db.execute("PRAGMA synchronous=NORMAL")
        with suppress(DiskFullError):
            with transaction(self._db, self._path):
                rows = [(*taken, number) for taken, number in self._unsaved.items()]
                self._db.executemany("INSERT OR REPLACE INTO taken VALUES (?, ?, ?)", rows)
            self._unsaved.clear()

    def close(self) -> None:
        """Close the file; another process may open it."""
        self._db.close()

    def _reserve(self, now: int) -> None:
        row = self._db.execute("SELECT upto FROM reserved").fetchone()
        start = max(int(row[0]) if row else 0, now)
        if start + BLOCK > MAX_COUNTER:
            raise ConfigError("the counter of this key has come to its end; make a new key: edge-runtime provision")
        self._db.execute("PRAGMA synchronous=FULL")
        with transaction(self._db, self._path):
            self._db.execute("INSERT OR REPLACE INTO reserved VALUES (1, ?)", (start + BLOCK,))
        self._next, self._end = start, start + BLOCK
