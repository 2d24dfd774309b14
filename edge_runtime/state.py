"""A device's durable state: one SQLite file in WAL mode. What a method returned from is on disk.

It holds which life of the fleet the device is in, the last settled round, the outbox (the update that is not accepted
yet), the bands it has fetched, and small facts worth keeping over a restart, such as the base's loss and the memory
that plans must stay below.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection
from pathlib import Path
from typing import Any

from edge_runtime.errors import ConfigError
from edge_runtime.wire.messages import Offer

SCHEMA = """
CREATE TABLE IF NOT EXISTS facts  (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS outbox (one INTEGER PRIMARY KEY CHECK (one = 1), offer TEXT NOT NULL, payload BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS bands  (sha256 TEXT PRIMARY KEY, payload BLOB NOT NULL);
"""


OF_THE_DEVICE = ("memory_ceiling", "unfinished")
"""Facts about this device and no fleet: they outlive the fleet's life."""


class DeviceState:
    """The device's memory. One process opens it at a time; a second one is refused."""

    def __init__(self, folder: Path) -> None:
        """Open, or create, the state in a folder.

        Raises:
            ConfigError: the folder cannot be written, or another process has the state open.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(folder / "device.db", timeout=2.0, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            # Held until close: two clients with one outbox would answer for each other.
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA.split(";"):
                self._db.execute(statement)
            self._db.execute("COMMIT")
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"a device state was expected in {folder}, which cannot be used ({error}); "
                "stop the other client, or choose another folder with --state-dir"
            ) from error

    @property
    def run(self) -> str:
        """The life of the fleet that everything here belongs to; empty for a device that never joined."""
        return str(self.fact("run") or "")

    @property
    def settled(self) -> int:
        """The last round whose update was accepted or given up."""
        return int(self.fact("settled") or 0)

    @property
    def outbox(self) -> tuple[Offer, bytes] | None:
        """The update that is not accepted yet."""
        row = self._db.execute("SELECT offer, payload FROM outbox").fetchone()
        return (Offer.model_validate_json(row[0]), bytes(row[1])) if row else None

    def put_outbox(self, offer: Offer, payload: bytes) -> None:
        """Keep an update until `settle`."""
        self._db.execute("INSERT OR REPLACE INTO outbox VALUES (1, ?, ?)", (offer.model_dump_json(), payload))

    def settle(self, round_number: int) -> None:
        """Empty the outbox and remember the round: both or neither."""
        self._db.execute("BEGIN IMMEDIATE")
        self._db.execute("DELETE FROM outbox")
        self._put("settled", max(round_number, self.settled))
        self._db.execute("COMMIT")

    def adopt(self, run: str) -> None:
        """Begin another life of the fleet: what belonged to the former one is forgotten."""
        self._db.execute("BEGIN IMMEDIATE")
        for table in ("outbox", "bands"):
            self._db.execute(f"DELETE FROM {table}")  # noqa: S608  the names are the two literals above
        self._db.execute("DELETE FROM facts WHERE name NOT IN (?, ?)", OF_THE_DEVICE)
        self._put("run", run)
        self._db.execute("COMMIT")

    def fact(self, name: str) -> Any:
        """A small fact, or None."""
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else None

    def put_fact(self, name: str, value: Any) -> None:
        """Remember a JSON-able fact."""
        self._put(name, value)

    def band(self, sha256: str) -> bytes | None:
        """A fetched band."""
        row = self._db.execute("SELECT payload FROM bands WHERE sha256 = ?", (sha256,)).fetchone()
        return bytes(row[0]) if row else None

    def put_band(self, sha256: str, payload: bytes) -> None:
        """Keep a fetched band."""
        self._db.execute("INSERT OR REPLACE INTO bands VALUES (?, ?)", (sha256, payload))

    def keep_bands(self, wanted: Collection[str]) -> None:
        """Forget all bands but these."""
        marks = ",".join("?" * len(wanted))
        self._db.execute(f"DELETE FROM bands WHERE sha256 NOT IN ({marks})", tuple(wanted))  # noqa: S608  only marks

    def close(self) -> None:
        """Close the file; another client may open it."""
        self._db.close()

    def _put(self, name: str, value: Any) -> None:
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))
