"""Durable state of a fleet's server: one SQLite file in WAL mode. What a method returned from is on disk.

Tables: `rounds` (the state machine as JSON, one row) and `members` (its devices), `versions` (merged state and its
bands), `blobs` (broadcast payloads), `updates` (accepted), `offers` and `chunks` (uploads under way), `events` (to be
recorded), `refusals` (counted). A merge, the version that it makes and the state that follows are one transaction, so a
crash at any point leaves a store from which the service goes on. The layout and its history: `server.schema`.

Every method that writes raises DiskFullError where there is no room; then nothing of it happened.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edge_runtime.database import Lock, connect, transaction
from edge_runtime.errors import ConfigError
from edge_runtime.wire.blobs import BlobRef, recut
from edge_runtime.wire.messages import Band, Offer
from server import schema

FILE, LOCK = "fleet.db", "fleet.lock"
PROOF_BYTES = 256 * 1024
YARDSTICK = 999
"""Norms that are looked at for each update: a median of more would be no better, and take longer with every update."""

Event = Mapping[str, Any]
"""Something to be recorded, JSON-able; see `Store.unrecorded`."""


@dataclass(frozen=True)
class Standing:
    """Where the rounds stand; see `server.standing`.

    Attributes:
        text: the state machine but for its members.
        members: name → row of those that changed.
    """

    text: str
    members: Mapping[str, str] = field(default_factory=dict)


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

    def cut(self, chunk_bytes: int) -> StoredVersion:
        """The same version, its bands in chunks of another size."""
        blobs = [band.blob.model_copy(update={"chunk_bytes": chunk_bytes}) for band in self.bands]
        bands = [band.model_copy(update={"blob": blob}) for band, blob in zip(self.bands, blobs, strict=True)]
        return replace(self, bands=tuple(bands))


class Store:
    """The server's memory. One process opens it at a time; a second one is refused.

    Others may read the file meanwhile, as `server.backup` does.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        """Open, or create, the store in a folder; one of an older layout is brought to the newest.

        Args:
            folder: of the store.
            durable: whether a commit waits for the disk; a simulation, which is run again after a kill, need not.

        Raises:
            ConfigError: the folder cannot be written, another process has the store open, or a newer version wrote it.
        """
        self.path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(folder / LOCK)  # two servers on one store would both open rounds
            with ExitStack() as failing:
                failing.callback(self._lock.release)
                self._db = connect(self.path, durable=durable)
                failing.callback(self._db.close)
                schema.migrate(self._db)
                failing.pop_all()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"a server store was expected in {folder}, which cannot be used ({error}); "
                "stop the other server, or choose another folder with --store"
            ) from error

    def _transaction(self) -> AbstractContextManager[None]:
        return transaction(self._db, self.path)

    def rounds(self) -> str | None:
        """The state of the rounds, as JSON, or None in a new store."""
        row = self._db.execute("SELECT state FROM rounds").fetchone()
        return str(row[0]) if row else None

    def members(self) -> Iterator[tuple[str, str]]:
        """Name and row of every member."""
        yield from self._db.execute("SELECT name, row FROM members ORDER BY rowid")

    def save_rounds(self, rounds: Standing) -> None:
        """Remember the state of the rounds."""
        with self._transaction():
            self._put_rounds(rounds)

    def save_version(
        self,
        version: StoredVersion,
        payloads: Sequence[bytes],
        rounds: Standing | None = None,
        event: Event | None = None,
        *,
        since: int | None = None,
    ) -> None:
        """Remember a version, its bands' payloads and, if given, the rounds' state that follows: all or nothing.

        With that state a round closes, so the uploads that are still under way have no use any more and are dropped:
        but for those that were trained from version `since`, or a newer one.
        """
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO versions VALUES (?, ?, ?)",
                (version.version, version.state, _bands(version.bands)),
            )
            for band, payload in zip(version.bands, payloads, strict=True):
                self._db.execute("INSERT OR REPLACE INTO blobs VALUES (?, ?)", (band.blob.sha256, payload))
            if rounds is not None:
                self._close_round(rounds, since)
            self._put_event(event)

    def close_round(self, rounds: Standing, event: Event, *, since: int | None = None) -> None:
        """Remember that a round closed without a new version: the rounds' state that follows, all or nothing."""
        with self._transaction():
            self._close_round(rounds, since)
            self._put_event(event)

    def recut(self, version: StoredVersion) -> None:
        """Remember that a version's bands travel in chunks of another size."""
        with self._transaction():
            self._db.execute(
                "UPDATE versions SET bands = ? WHERE version = ?", (_bands(version.bands), version.version)
            )

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

    def outdated(self, version: int, *, since: int = 0) -> list[BlobRef]:
        """What the broker should not keep: blobs of a version and of those before it that no newer version shares.

        All that are still here, and of versions from `since` on also those that `retire` has forgotten.
        """
        old: dict[str, tuple[int, BlobRef]] = {}
        newer: set[str] = set()
        for number, bands in self._db.execute("SELECT version, bands FROM versions ORDER BY version"):
            refs = {band["blob"]["sha256"]: BlobRef.model_validate(band["blob"]) for band in json.loads(bands)}
            if number > version:
                newer.update(refs)
            else:
                old |= {sha256: (number, ref) for sha256, ref in refs.items()}
        here = {sha256 for (sha256,) in self._db.execute("SELECT sha256 FROM blobs")}
        return [
            ref for sha256, (number, ref) in old.items() if sha256 not in newer and (number >= since or sha256 in here)
        ]

    def retire(self, version: int) -> list[BlobRef]:
        """Forget the blobs and updates of a version and of those before it; returns the blobs that were here.

        Blobs that a newer version shares stay. So do merged states: a version can always be exported. A round makes
        one version at most, so the updates of a version are of no later round than its number.
        """
        gone = self.outdated(version, since=version + 1)
        with self._transaction():
            self._db.executemany("DELETE FROM blobs WHERE sha256 = ?", [(ref.sha256,) for ref in gone])
            self._db.execute("DELETE FROM updates WHERE round <= ?", (version,))
        return gone

    def offered(self, offer: Offer) -> set[int]:
        """Begin, or go on with, a device's one upload; others are dropped. Returns the chunks that are here.

        A blob that is offered again in chunks of another size keeps what is here of it.
        """
        known = self.offer_of(offer.client)
        if known == offer:
            return self.have(offer)
        kept: dict[int, bytes] = {}
        if known is not None and known.blob.sha256 == offer.blob.sha256:
            kept = recut(self.chunks(known), known.blob, offer.blob)
        with self._transaction():
            self._db.execute("DELETE FROM chunks WHERE client = ?", (offer.client,))
            self._db.executemany(
                "INSERT INTO chunks VALUES (?, ?, ?, ?)",
                [(offer.client, offer.blob.sha256, index, payload) for index, payload in kept.items()],
            )
            self._db.execute(
                "INSERT OR REPLACE INTO offers VALUES (?, ?, ?, ?)",
                (offer.client, offer.version, offer.blob.size, offer.model_dump_json()),
            )
        return set(kept)

    def offer_of(self, client: str) -> Offer | None:
        """The upload that a device has under way."""
        row = self._db.execute("SELECT offer FROM offers WHERE client = ?", (client,)).fetchone()
        return Offer.model_validate_json(row[0]) if row else None

    def staged(self) -> dict[str, int]:
        """Device → bytes that its upload under way will take in all."""
        return {client: int(size) for client, size in self._db.execute("SELECT client, size FROM offers")}

    def staged_bytes(self) -> int:
        """Bytes that all uploads under way will take in all."""
        return int(self._db.execute("SELECT TOTAL(size) FROM offers").fetchone()[0])

    def add_chunk(self, offer: Offer, index: int, payload: bytes) -> set[int]:
        """Store one chunk of an upload; twice is once. Returns the chunks that are here."""
        with self._transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO chunks VALUES (?, ?, ?, ?)", (offer.client, offer.blob.sha256, index, payload)
            )
        return self.have(offer)

    def have(self, offer: Offer) -> set[int]:
        """The chunks of an upload that are here."""
        rows = self._db.execute(
            "SELECT n FROM chunks WHERE client = ? AND sha256 = ?", (offer.client, offer.blob.sha256)
        )
        return {int(n) for (n,) in rows}

    def chunks(self, offer: Offer) -> dict[int, bytes]:
        """All chunks of an upload that are here."""
        rows = self._db.execute(
            "SELECT n, payload FROM chunks WHERE client = ? AND sha256 = ?", (offer.client, offer.blob.sha256)
        )
        return {int(n): bytes(payload) for n, payload in rows}

    def drop_upload(self, offer: Offer) -> None:
        """Forget an upload: it turned out corrupt, or gave its room to another."""
        with self._transaction():
            self._forget(offer)

    def accept(
        self,
        offer: Offer,
        payload: bytes,
        rounds: Standing,
        *,
        number: int | None = None,
        norm: float | None = None,
        event: Event | None = None,
    ) -> None:
        """An upload becomes an update, and the state of the rounds says so: all or nothing.

        Args:
            offer: its offer.
            payload: its blob.
            rounds: the state that follows.
            number: of the round whose merge takes it; that in which it was trained when absent.
            norm: how far it moves the model.
            event: to be recorded.
        """
        with self._transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO updates VALUES (?, ?, ?, ?, ?, ?)",
                (
                    offer.round if number is None else number,
                    offer.client,
                    offer.round,
                    norm,
                    offer.model_dump_json(),
                    payload,
                ),
            )
            self._forget(offer)
            self._put_rounds(rounds)
            self._put_event(event)

    def norms(self, round_number: int, *, before: int = 1) -> list[float]:
        """How far the last updates of a round and of so many before it move, as far as they are here."""
        rows = self._db.execute(
            # Rows in the order in which they came: without the index, the newest are found at once.
            "SELECT norm FROM updates NOT INDEXED WHERE round BETWEEN ? AND ? AND norm IS NOT NULL "
            "ORDER BY rowid DESC LIMIT ?",
            (round_number - before, round_number, YARDSTICK),
        )
        return [float(norm) for (norm,) in rows]

    def updates(self, round_number: int) -> Iterator[tuple[Offer, bytes]]:
        """The updates that a round's merge takes, by training round and device, one in memory at a time."""
        names = self._db.execute(
            "SELECT trained, client FROM updates WHERE round = ? ORDER BY trained, client", (round_number,)
        ).fetchall()
        for trained, client in names:
            offer, payload = self._db.execute(
                "SELECT offer, payload FROM updates WHERE round = ? AND client = ? AND trained = ?",
                (round_number, client, trained),
            ).fetchone()
            yield Offer.model_validate_json(offer), bytes(payload)

    def unrecorded(self) -> list[tuple[int, dict[str, Any]]]:
        """What happened and is not recorded yet, with its number, which is never used again.

        An event is stored in the transaction of what it tells of, so it is there exactly if that happened.
        """
        rows = self._db.execute("SELECT n, event FROM events ORDER BY n").fetchall()
        return [(int(n), json.loads(event)) for n, event in rows]

    def recorded(self, number: int) -> None:
        """Forget the events up to this one: they are recorded."""
        with self._transaction():
            self._db.execute("DELETE FROM events WHERE n <= ?", (number,))

    def refusals(self) -> dict[str, int]:
        """Code → how often something was refused with it."""
        return {code: int(count) for code, count in self._db.execute("SELECT code, count FROM refusals ORDER BY code")}

    def save_refusals(self, counts: Mapping[str, int]) -> None:
        """Remember how often something was refused, in all."""
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO refusals VALUES (?, ?)", list(counts.items()))

    def prove_room(self) -> None:
        """Write and remove as much as a chunk or two: on a disk that is nearly full, a small write says nothing."""
        with self._transaction():
            self._db.execute("DROP TABLE IF EXISTS ballast")
            self._db.execute("CREATE TABLE ballast AS SELECT zeroblob(?)", (PROOF_BYTES,))
        with self._transaction():
            self._db.execute("DROP TABLE ballast")

    def close(self) -> None:
        """Close the file; another server may open it."""
        self._db.close()
        self._lock.release()

    def _forget(self, offer: Offer) -> None:
        self._db.execute("DELETE FROM chunks WHERE client = ?", (offer.client,))
        self._db.execute("DELETE FROM offers WHERE client = ?", (offer.client,))

    def _close_round(self, rounds: Standing, since: int | None) -> None:
        self._put_rounds(rounds)
        # Comparison with nothing is not true: without `since`, none of them is kept.
        self._db.execute("DELETE FROM offers WHERE version >= ? IS NOT TRUE", (since,))
        self._db.execute("DELETE FROM chunks WHERE client NOT IN (SELECT client FROM offers)")

    def _put_rounds(self, rounds: Standing) -> None:
        self._db.execute("INSERT OR REPLACE INTO rounds VALUES (1, ?)", (rounds.text,))
        self._db.executemany(
            "INSERT INTO members VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET row = excluded.row",
            list(rounds.members.items()),
        )

    def _put_event(self, event: Event | None) -> None:
        if event is not None:
            self._db.execute("INSERT INTO events (event) VALUES (?)", (json.dumps(event),))


def _bands(bands: Sequence[Band]) -> str:
    return json.dumps([band.model_dump(mode="json") for band in bands])
