"""A device's durable state: one SQLite file in WAL mode. What a method returned from is on disk.

It holds which life of the fleet the device is in, the last settled round, the outbox (the update that is not accepted
yet), what the codec still owes the fleet, what the device keeps for itself, its personal adapter, the bands it has
fetched, and small facts worth keeping over a restart, such as the base's loss and the memory that plans must stay
below.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from edge_runtime.database import transaction
from edge_runtime.errors import ConfigError, DiskFullError
from edge_runtime.wire.messages import Offer

SCHEMA = """
CREATE TABLE IF NOT EXISTS facts  (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS outbox (one INTEGER PRIMARY KEY CHECK (one = 1), offer TEXT NOT NULL, payload BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS owed   (state TEXT PRIMARY KEY, residual BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS kept   (one INTEGER PRIMARY KEY CHECK (one = 1), private BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS personal (one INTEGER PRIMARY KEY CHECK (one = 1), record TEXT NOT NULL, change BLOB);
CREATE TABLE IF NOT EXISTS bands  (sha256 TEXT PRIMARY KEY, payload BLOB NOT NULL);
"""


OF_THE_DEVICE = ("memory_ceiling", "unfinished", "instance")
"""Facts about this device and no fleet: they outlive the fleet's life."""


Statement = tuple[str, tuple[Any, ...]]
"""SQL, and the values of its marks."""


class Memory(Protocol):
    """What a local round reads of what a device remembers, and writes down while it goes on; see `DeviceState`."""

    @property
    def owed(self) -> bytes | None:
        """What the updates accepted so far left out."""

    @property
    def kept(self) -> bytes | None:
        """What the device keeps for itself."""

    def fact(self, name: str) -> Any:
        """A small fact, or None."""

    def put_fact(self, name: str, value: Any) -> None:
        """Remember a JSON-able fact."""


class DeviceState:
    """The device's memory. One process opens it at a time; a second one is refused.

    Attributes:
        on_full: told when a write does not fit, of which nothing has happened then. It returns for another try, once
            there may be room, or raises; by default it raises the DiskFullError that it was given.
    """

    on_full: Callable[[DiskFullError], None]

    def __init__(self, folder: Path) -> None:
        """Open, or create, the state in a folder.

        Raises:
            ConfigError: the folder cannot be written, or another process has the state open.
        """
        self.on_full = _raise
        self._path = folder / "device.db"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self._path, timeout=2.0, isolation_level=None)
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
    def instance(self) -> str:
        """Names this folder, however its device is called: when it was first used, and a word by chance."""
        found = self.fact("instance")
        if found is None:
            found = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
            self.put_fact("instance", found)
        return str(found)

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

    @property
    def owed(self) -> bytes | None:
        """What the updates accepted so far left out: a residual of `wire.feedback`."""
        row = self._db.execute("SELECT residual FROM owed WHERE state = 'now'").fetchone()
        return bytes(row[0]) if row else None

    @property
    def kept(self) -> bytes | None:
        """What this device keeps for itself; see `private`."""
        row = self._db.execute("SELECT private FROM kept").fetchone()
        return bytes(row[0]) if row else None

    @property
    def personal(self) -> tuple[dict[str, Any], bytes | None] | None:
        """What `put_personal` was given last: the record, and the change if there was one."""
        row = self._db.execute("SELECT record, change FROM personal").fetchone()
        return (json.loads(row[0]), row[1] if row[1] is None else bytes(row[1])) if row else None

    def put_personal(self, record: Mapping[str, Any], change: bytes | None, private: bytes | None) -> None:
        """Remember a personal adapter with what it belongs to: all or nothing.

        Args:
            record: JSON-able; see `personalising`.
            change: what is the device's own of it; None for nothing.
            private: what this device keeps for itself from round to round; None for what it has.
        """
        more = [] if private is None else [("INSERT OR REPLACE INTO kept VALUES (1, ?)", (private,))]
        self._write(("INSERT OR REPLACE INTO personal VALUES (1, ?, ?)", (json.dumps(dict(record)), change)), *more)

    def put_outbox(
        self,
        offer: Offer,
        payload: bytes,
        residual: bytes | None = None,
        private: bytes | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep an update until `settle`, with what follows from its round: all or nothing.

        Args:
            offer: of the update.
            payload: its bytes.
            residual: what will be owed once it is accepted.
            private: what this device keeps for itself; None for what it has.
            facts: to be remembered.
        """
        owed: list[Statement] = [("DELETE FROM owed WHERE state = 'once accepted'", ())]
        if residual is not None:
            owed.append(("INSERT INTO owed VALUES ('once accepted', ?)", (residual,)))
        if private is not None:
            owed.append(("INSERT OR REPLACE INTO kept VALUES (1, ?)", (private,)))
        owed += [_fact(name, value) for name, value in (facts or {}).items()]
        self._write(("INSERT OR REPLACE INTO outbox VALUES (1, ?, ?)", (offer.model_dump_json(), payload)), *owed)

    def recut_outbox(self, offer: Offer) -> None:
        """The same update is offered in another way; what it owes stays as it is."""
        self._write(("UPDATE outbox SET offer = ?", (offer.model_dump_json(),)))

    def settle(self, round_number: int, *, arrived: bool = True) -> None:
        """Empty the outbox, remember the round, and what is owed now: all or nothing.

        Args:
            round_number: the round of the update in the outbox.
            arrived: whether it was accepted. If not, nothing of it was applied, neither what it carried of former
                updates nor this round's: what was owed before is owed still.
        """
        owed: list[Statement] = []
        if arrived and self.outbox is not None:
            owed = [("DELETE FROM owed WHERE state = 'now'", ()), ("UPDATE owed SET state = 'now'", ())]
        self._write(
            *owed,
            ("DELETE FROM owed WHERE state = 'once accepted'", ()),
            ("DELETE FROM outbox", ()),
            _fact("settled", max(round_number, self.settled)),
        )

    def adopt(self, run: str) -> None:
        """Begin another life of the fleet: what belonged to the former one is forgotten."""
        marks = ",".join("?" * len(OF_THE_DEVICE))
        self._write(
            ("DELETE FROM outbox", ()),
            ("DELETE FROM owed", ()),
            ("DELETE FROM kept", ()),
            ("DELETE FROM personal", ()),
            ("DELETE FROM bands", ()),
            (f"DELETE FROM facts WHERE name NOT IN ({marks})", OF_THE_DEVICE),  # noqa: S608  only marks
            _fact("run", run),
        )

    def fact(self, name: str) -> Any:
        """A small fact, or None."""
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else None

    def put_fact(self, name: str, value: Any) -> None:
        """Remember a JSON-able fact."""
        self._write(_fact(name, value))

    def band(self, sha256: str) -> bytes | None:
        """A fetched band."""
        row = self._db.execute("SELECT payload FROM bands WHERE sha256 = ?", (sha256,)).fetchone()
        return bytes(row[0]) if row else None

    def put_band(self, sha256: str, payload: bytes) -> None:
        """Keep a fetched band."""
        self._write(("INSERT OR REPLACE INTO bands VALUES (?, ?)", (sha256, payload)))

    def keep_bands(self, wanted: Collection[str]) -> None:
        """Forget all bands but these."""
        marks = ",".join("?" * len(wanted))
        self._write((f"DELETE FROM bands WHERE sha256 NOT IN ({marks})", tuple(wanted)))  # noqa: S608  only marks

    def close(self) -> None:
        """Close the file; another client may open it."""
        self._db.close()

    def _write(self, *statements: Statement) -> None:
        """All of them or none; where there is no room, what `on_full` says."""
        while True:
            try:
                with transaction(self._db, self._path):
                    for statement, values in statements:
                        self._db.execute(statement, values)
            except DiskFullError as error:
                self.on_full(error)
            else:
                return


def _fact(name: str, value: Any) -> Statement:
    return "INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value))


def _raise(error: DiskFullError) -> None:
    raise error
