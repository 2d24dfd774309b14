"""What devices computed, on disk by the digest of their task: a simulation that was killed computes nothing twice.

A run is the same each time, so it is resumed by running it again: clock, protocol and merges go through what happened,
and every round that a device had computed is read from here. A file that changed in between is no danger: another task
has another digest.

So it is also the disk of the devices: what is large of an outcome is read from here when it is sent, or owed.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from functools import partial
from pathlib import Path

from edge_runtime.errors import ConfigError
from simulation.engines import Keeping
from simulation.stored import LARGE, Blob, Stored, whole
from simulation.work import Done, Task

SCHEMA = "CREATE TABLE IF NOT EXISTS done (key TEXT PRIMARY KEY, facts TEXT, payload BLOB, residual BLOB, private BLOB)"
BLOBS = ("payload", "residual", "private")
WRITTEN_AT_ONCE = 64
"""Small outcomes that a kill may cost; of those of real training, at most a few."""


class Journal:
    """Implements `simulation.engines.Engine` by another one, and by what is on disk.

    Args:
        path: the file; made where there is none.
        engine: computes what it lacks.
        digest: of what outcomes depend on beside their task.

    Raises:
        ConfigError: the file cannot be used.
    """

    def __init__(self, path: Path, engine: Keeping, digest: str) -> None:
        self._engine, self._digest, self._unwritten = engine, digest[:16], 0
        self._asked: set[str] = set()
        self._computed: set[str] = set()
        self.found = 0
        """Outcomes that were there."""
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(SCHEMA)
            self._db.execute("BEGIN")
            engine.keep_by(self._keep)
        except sqlite3.Error as error:
            raise ConfigError(
                f"the outcomes of a simulation were expected in {path}, which cannot be used ({error}); "
                "end the other simulation, or choose another folder with --out"
            ) from error

    def submit(self, task: Task) -> None:
        """Have it computed, unless it was."""
        if not self._db.execute("SELECT 1 FROM done WHERE key = ?", (self._key(task.key),)).fetchone():
            self._asked.add(task.key)
            self._engine.submit(task)

    def result(self, key: str) -> Done:
        """From the engine, which has it on the disk by then, or from there alone."""
        if key in self._asked:
            self._asked.discard(key)
            return self._engine.result(key)
        query = "SELECT facts, payload, residual, private FROM done WHERE key = ?"
        row = self._db.execute(query, (self._key(key),)).fetchone()
        if row is None:
            return self._engine.result(key)
        self.found += key not in self._computed
        facts, *blobs = row
        return self._aside(key, Done(*blobs, **json.loads(facts)))

    def _keep(self, key: str, done: Done) -> Done:
        """An outcome goes to the disk, and what is large of it stays there."""
        facts = json.dumps({name: value for name, value in vars(done).items() if name not in BLOBS})
        values = (self._key(key), facts, done.payload, done.residual, done.private)
        self._db.execute("INSERT OR REPLACE INTO done VALUES (?, ?, ?, ?, ?)", values)
        self._computed.add(key)
        # What is large took long to compute: a kill shall cost less of it.
        self._unwritten += 1 + sum(len(getattr(done, name) or b"") for name in BLOBS) // LARGE
        if self._unwritten >= WRITTEN_AT_ONCE:
            self._write()
        return self._aside(key, done)

    def _aside(self, key: str, done: Done) -> Done:
        def aside(name: str, blob: Blob | None) -> Blob | None:
            return Stored(partial(self._read, name, self._key(key))) if len(whole(blob) or b"") >= LARGE else blob

        payload, residual, private = (aside(name, getattr(done, name)) for name in BLOBS)
        return replace(done, payload=payload or b"", residual=residual or b"", private=private)

    def _read(self, name: str, key: str) -> bytes:
        blob: bytes = self._db.execute(f"SELECT {name} FROM done WHERE key = ?", (key,)).fetchone()[0]  # noqa: S608
        return blob

    def forget(self, key: str) -> None:
        """It is not wanted any more."""
        self._asked.discard(key)
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
