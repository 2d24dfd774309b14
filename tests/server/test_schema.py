"""Stores of every layout there has been, and of those there have not been yet."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.wire import blobs
from edge_runtime.wire.messages import Band
from server import schema
from server.store import FILE, Standing, Store, StoredVersion
from tests.runtime.said import offer

UNVERSIONED = """
CREATE TABLE IF NOT EXISTS rounds   (one INTEGER PRIMARY KEY CHECK (one = 1), state TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS versions (version INTEGER PRIMARY KEY, state BLOB NOT NULL, bands TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS blobs    (sha256 TEXT PRIMARY KEY, payload BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS updates  (round INTEGER, client TEXT, offer TEXT NOT NULL, payload BLOB NOT NULL,
                                     PRIMARY KEY (round, client));
CREATE TABLE IF NOT EXISTS offers   (client TEXT PRIMARY KEY, offer TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS chunks   (client TEXT, sha256 TEXT, n INTEGER, payload BLOB NOT NULL,
                                     PRIMARY KEY (client, sha256, n));
"""
"""The layout before layouts were counted, word for word."""

UPDATE, UPLOAD = offer("a", payload=b"abcdefgh"), offer("b", payload=b"ijklmnop")
KEPT = StoredVersion(3, b"merged", (Band(start=0, stop=4, blob=blobs.describe(b"band")),))


def old_store(folder: Path) -> Path:
    """A store as the first release left it: a version, an update, an upload under way."""
    folder.mkdir()
    db = sqlite3.connect(folder / FILE)
    db.execute("PRAGMA journal_mode=WAL")
    db.executescript(UNVERSIONED)
    db.execute("INSERT INTO rounds VALUES (1, 'where it stands')")
    db.execute("INSERT INTO versions VALUES (3, ?, ?)", (b"merged", f"[{KEPT.bands[0].model_dump_json()}]"))
    db.execute("INSERT INTO blobs VALUES (?, ?)", (KEPT.bands[0].blob.sha256, b"band"))
    db.execute("INSERT INTO updates VALUES (1, 'a', ?, ?)", (UPDATE.model_dump_json(), b"abcdefgh"))
    db.execute("INSERT INTO offers VALUES ('b', ?)", (UPLOAD.model_dump_json(),))
    db.execute("INSERT INTO chunks VALUES ('b', ?, 1, ?)", (UPLOAD.blob.sha256, b"mnop"))
    db.commit()
    db.close()
    return folder


def check(store: Store) -> None:
    """All that the old store held is there, and what is new works."""
    assert store.rounds() == "where it stands"
    assert store.version(3) == KEPT
    assert list(store.updates(1)) == [(UPDATE, b"abcdefgh")]
    assert store.offer_of("b") == UPLOAD
    assert store.chunks(UPLOAD) == {1: b"mnop"}
    assert store.norms(1) == []
    store.accept(UPLOAD, b"ijklmnop", Standing("after"), norm=2.0, event={"event": "update"})
    assert store.norms(1) == [2.0]
    assert [event for _, event in store.unrecorded()] == [{"event": "update"}]


def test_a_store_of_the_first_layout_is_migrated_with_all_that_it_holds(tmp_path: Path) -> None:
    folder = old_store(tmp_path / "store")
    store = Store(folder)
    check(store)
    store.close()
    again = Store(folder)
    assert again.rounds() == "after"
    assert again._db.execute("PRAGMA user_version").fetchone() == (len(schema.MIGRATIONS),)
    again.close()


def test_a_migrated_store_has_the_layout_of_a_new_one(tmp_path: Path) -> None:
    layouts = []
    for folder in (old_store(tmp_path / "old"), tmp_path / "new"):
        store = Store(folder)
        tables = [name for (name,) in store._db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        layouts.append({name: store._db.execute(f"PRAGMA table_info({name})").fetchall() for name in tables})
        store.close()
    assert layouts[0] == layouts[1]


def test_a_migration_that_a_kill_interrupts_is_made_again(tmp_path: Path) -> None:
    """At every statement: the file is as it was, or migrated."""

    class Dying(sqlite3.Connection):
        left = 0

        def execute(self, *arguments, **kwargs):
            Dying.left -= 1
            if Dying.left < 0:
                raise KeyboardInterrupt
            return super().execute(*arguments, **kwargs)

    at, done = 0, False
    while not done:
        folder = old_store(tmp_path / f"store-{at}")
        db = sqlite3.connect(folder / FILE, isolation_level=None, factory=Dying)
        Dying.left = at
        try:
            schema.migrate(db)
            done = True
        except KeyboardInterrupt:
            at += 1
        db.close()
        store = Store(folder)
        check(store)
        store.close()
    assert at > 5


def test_a_store_of_a_newer_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    Store(tmp_path).close()
    db = sqlite3.connect(tmp_path / FILE)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(ConfigError, match=r"layout 99, and this version knows layouts up to \d+; install the newer"):
        Store(tmp_path)


def test_a_database_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / FILE)
    db.execute("PRAGMA application_id = 7")
    db.execute("CREATE TABLE theirs (one)")
    db.close()
    with pytest.raises(ConfigError, match="another program"):
        Store(tmp_path)
    db = sqlite3.connect(tmp_path / FILE)
    assert db.execute("SELECT name FROM sqlite_schema").fetchall() == [("theirs",)]
    db.close()


def test_no_row_of_the_table_is_ever_changed() -> None:
    """Stores out there have had them. A new layout is a new row, and a new digest here."""
    digests = [blobs.digest("\n".join(statements).encode())[:12] for statements in schema.MIGRATIONS]
    assert digests == ["683691a2f6fe", "dbe96ad0331f", "7d531f4a95a0"]
