"""What devices computed, on disk by the digest of their task: a simulation that was killed computes nothing twice.

A run is the same each time, so it is resumed by running it again: clock, protocol and merges go through what happened,
and every round that a device had computed is read from here. A file that changed in between is no danger: another task
has another digest.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from edge_runtime.errors import ConfigError
from simulation.engines import Engine
from simulation.work import Done, Task

SCHEMA = "CREATE TABLE IF NOT EXISTS done (key TEXT PRIMARY KEY, facts TEXT, payload BLOB, residual BLOB, private BLOB)"
WRITTEN_AT_ONCE = 64
"""Outcomes that a kill may cost."""


class Journal:
    """Implements `simulation.engines.Engine` by another one, and by what is on disk.

    Args:
        path: the file; made where there is none.
        engine: computes what it lacks.
        digest: of what outcomes depend on beside their task.

    Raises:
        ConfigError: the file cannot be used.
    """

    def __init__(self, path: Path, engine: Engine, digest: str) -> None:
        self._engine, self._digest, self._unwritten = engine, digest[:16], 0
        self.found = 0
        """Outcomes that were there."""
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(SCHEMA)
            self._db.execute("BEGIN")
        except sqlite3.Error as error:
            raise ConfigError(
                f"the outcomes of a simulation were expected in {path}, which cannot be used ({error}); "
                "end the other simulation, or choose another folder with --out"
            ) from error

    def submit(self, task: Task) -> None:
        """Have it computed, unless it was."""
        if not self._db.execute("SELECT 1 FROM done WHERE key = ?", (self._key(task.key),)).fetchone():
            self._engine.submit(task)

    def result(self, key: str) -> Done:
        """From the disk, or from the engine and to the disk."""
        query = "SELECT facts, payload, residual, private FROM done WHERE key = ?"
        row = self._db.execute(query, (self._key(key),)).fetchone()
        if row is not None:
            self.found += 1
            facts, payload, residual, private = row
            return Done(payload=payload, residual=residual, private=private, **json.loads(facts))
        done = self._engine.result(key)
        blobs = {"payload", "residual", "private"}
        facts = json.dumps({name: value for name, value in vars(done).items() if name not in blobs})
        values = (self._key(key), facts, done.payload, done.residual, done.private)
        self._db.execute("INSERT OR REPLACE INTO done VALUES (?, ?, ?, ?, ?)", values)
        self._unwritten += 1
        if self._unwritten >= WRITTEN_AT_ONCE:
            self._write()
        return done

    def forget(self, key: str) -> None:
        """It is not wanted any more."""
        self._engine.forget(key)

    def close(self) -> None:
        """Write what is left, and end the engine."""
        self._write()
        self._db.execute("COMMIT")
        self._db.close()
        self._engine.close()

    def _write(self) -> None:
        self._db.execute("COMMIT")
        self._db.execute("BEGIN")
        self._unwritten = 0

    def _key(self, key: str) -> str:
        return f"{self._digest}:{key}"
