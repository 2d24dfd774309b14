"""Durable state of a fleet's server: one SQLite file in WAL mode. What `commit` returned from is on disk.

Tables: `rounds` (the state machine as JSON, one row), `versions` (merged state and its bands), `blobs` (broadcast
payloads), `updates` (accepted), `chunks` (uploads under way). A merge, the version that it makes and the state that
follows are one transaction, so a crash at any point leaves a store from which the service goes on.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import ConfigError
from edge_runtime.wire.blobs import BlobRef
from edge_runtime.wire.messages import Band, Offer

SCHEMA = """
CREATE TABLE IF NOT EXISTS rounds   (one INTEGER PRIMARY KEY CHECK (one = 1), state TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS versions (version INTEGER PRIMARY KEY, state BLOB NOT NULL, bands TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS blobs    (sha256 TEXT PRIMARY KEY, payload BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS updates  (round INTEGER, client TEXT, offer TEXT NOT NULL, payload BLOB NOT NULL,
                                     PRIMARY KEY (round, client));
CREATE TABLE IF NOT EXISTS offers   (client TEXT PRIMARY KEY, offer TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS chunks   (client TEXT, sha256 TEXT, n INTEGER, payload BLOB NOT NULL,
                                     PRIMARY KEY (client, sha256, n));
"""


@dataclass(frozen=True)
class StoredVersion:
    """A version of the global adapter.

    Attributes:
        version: its number.
        state: what the method carries, as `server.aggregators.method.save_state` wrote it.
        bands: where its bands are; their payloads are in `blobs`.
    """

    version: int
    state: bytes
    bands: tuple[Band, ...]


class Store:
    """The server's memory. One process opens it at a time; a second one is refused."""

    def __init__(self, folder: Path) -> None:
        """Open, or create, the store in a folder.

        Raises:
            ConfigError: the folder cannot be written, or another process has the store open.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(folder / "fleet.db", timeout=2.0, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            # Held until close: two servers on one store would both open rounds.
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            with self._transaction():
                for statement in SCHEMA.split(";"):
                    self._db.execute(statement)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"a server store was expected in {folder}, which cannot be used ({error}); "
                "stop the other server, or choose another folder with --store"
            ) from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def rounds(self) -> str | None:
        """The state of the rounds, as JSON, or None in a new store."""
        row = self._db.execute("SELECT state FROM rounds").fetchone()
        return str(row[0]) if row else None

    def save_rounds(self, state: str) -> None:
        """Remember the state of the rounds."""
        with self._transaction():
            self._put_rounds(state)

    def save_version(self, version: StoredVersion, payloads: Sequence[bytes], rounds: str | None = None) -> None:
        """Remember a version, its bands' payloads and, if given, the rounds' state that follows: all or nothing."""
        with self._transaction():
            bands = json.dumps([band.model_dump(mode="json") for band in version.bands])
            self._db.execute(
                "INSERT OR REPLACE INTO versions VALUES (?, ?, ?)", (version.version, version.state, bands)
            )
            for band, payload in zip(version.bands, payloads, strict=True):
                self._db.execute("INSERT OR REPLACE INTO blobs VALUES (?, ?)", (band.blob.sha256, payload))
            if rounds is not None:
                self._put_rounds(rounds)

    def version(self, number: int) -> StoredVersion | None:
        """A version, or None if there is none of that number."""
        row = self._db.execute("SELECT state, bands FROM versions WHERE version = ?", (number,)).fetchone()
        if row is None:
            return None
        return StoredVersion(number, bytes(row[0]), tuple(Band.model_validate(band) for band in json.loads(row[1])))

    def versions(self) -> list[int]:
        """Numbers of all versions, rising."""
        return [int(number) for (number,) in self._db.execute("SELECT version FROM versions ORDER BY version")]

    def blob(self, sha256: str) -> bytes | None:
        """A broadcast payload."""
        row = self._db.execute("SELECT payload FROM blobs WHERE sha256 = ?", (sha256,)).fetchone()
        return bytes(row[0]) if row else None

    def retire(self, version: int) -> list[BlobRef]:
        """Forget the blobs and updates of a version and of those before it; returns what the broker should clear.

        Blobs that a newer version shares stay. So do merged states: a version can always be exported.
        """
        old: dict[str, BlobRef] = {}
        newer: set[str] = set()
        for number, bands in self._db.execute("SELECT version, bands FROM versions"):
            refs = {band["blob"]["sha256"]: BlobRef.model_validate(band["blob"]) for band in json.loads(bands)}
            if number > version:
                newer.update(refs)
            else:
                old.update(refs)
        here = {sha256 for (sha256,) in self._db.execute("SELECT sha256 FROM blobs")}
        gone = [ref for sha256, ref in old.items() if sha256 in here - newer]
        with self._transaction():
            self._db.executemany("DELETE FROM blobs WHERE sha256 = ?", [(ref.sha256,) for ref in gone])
            self._db.execute("DELETE FROM updates WHERE round <= ?", (version,))
        return gone

    def offered(self, offer: Offer) -> set[int]:
        """Begin, or go on with, a device's one upload; others are dropped. Returns the chunks that are here."""
        with self._transaction():
            self._db.execute("DELETE FROM chunks WHERE client = ? AND sha256 != ?", (offer.client, offer.blob.sha256))
            self._db.execute("INSERT OR REPLACE INTO offers VALUES (?, ?)", (offer.client, offer.model_dump_json()))
        return self._have(offer)

    def offer_of(self, client: str) -> Offer | None:
        """The upload that a device has under way."""
        row = self._db.execute("SELECT offer FROM offers WHERE client = ?", (client,)).fetchone()
        return Offer.model_validate_json(row[0]) if row else None

    def add_chunk(self, offer: Offer, index: int, payload: bytes) -> set[int]:
        """Store one chunk of an upload; twice is once. Returns the chunks that are here."""
        with self._transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO chunks VALUES (?, ?, ?, ?)", (offer.client, offer.blob.sha256, index, payload)
            )
        return self._have(offer)

    def chunks(self, offer: Offer) -> dict[int, bytes]:
        """All chunks of an upload that are here."""
        rows = self._db.execute(
            "SELECT n, payload FROM chunks WHERE client = ? AND sha256 = ?", (offer.client, offer.blob.sha256)
        )
        return {int(n): bytes(payload) for n, payload in rows}

    def drop_upload(self, offer: Offer) -> None:
        """Forget an upload that turned out corrupt."""
        with self._transaction():
            self._forget(offer)

    def accept(self, offer: Offer, payload: bytes, rounds: str) -> None:
        """An upload becomes an update, and the state of the rounds says so: all or nothing."""
        with self._transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO updates VALUES (?, ?, ?, ?)",
                (offer.round, offer.client, offer.model_dump_json(), payload),
            )
            self._forget(offer)
            self._put_rounds(rounds)

    def updates(self, round_number: int) -> Iterator[tuple[Offer, bytes]]:
        """The updates of a round, by device name, one in memory at a time."""
        names = self._db.execute(
            "SELECT client FROM updates WHERE round = ? ORDER BY client", (round_number,)
        ).fetchall()
        for (client,) in names:
            offer, payload = self._db.execute(
                "SELECT offer, payload FROM updates WHERE round = ? AND client = ?", (round_number, client)
            ).fetchone()
            yield Offer.model_validate_json(offer), bytes(payload)

    def close(self) -> None:
        """Close the file; another server may open it."""
        self._db.close()

    def _have(self, offer: Offer) -> set[int]:
        rows = self._db.execute(
            "SELECT n FROM chunks WHERE client = ? AND sha256 = ?", (offer.client, offer.blob.sha256)
        )
        return {int(n) for (n,) in rows}

    def _forget(self, offer: Offer) -> None:
        self._db.execute("DELETE FROM chunks WHERE client = ?", (offer.client,))
        self._db.execute("DELETE FROM offers WHERE client = ?", (offer.client,))

    def _put_rounds(self, state: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO rounds VALUES (1, ?)", (state,))
