"""The layout of a server's store, and how an older one becomes it: a literal table of migrations.

SQLite's `user_version` counts the migrations that a file has had, its `application_id` says that the file is ours.
A migration and the new count are one transaction, so that a kill in between leaves the file as it was. Rows of this
table are history: they are never changed, only appended to.
"""

from __future__ import annotations

import sqlite3

from edge_runtime.errors import ConfigError

APPLICATION_ID = 0x45524653
"""ASCII "ERFS"."""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    # 1: the first layout. Stores that were made before layouts were counted have it already, hence IF NOT EXISTS.
    (
        "CREATE TABLE IF NOT EXISTS rounds   (one INTEGER PRIMARY KEY CHECK (one = 1), state TEXT NOT NULL)",
        "CREATE TABLE IF NOT EXISTS versions (version INTEGER PRIMARY KEY, state BLOB NOT NULL, bands TEXT NOT NULL)",
        "CREATE TABLE IF NOT EXISTS blobs    (sha256 TEXT PRIMARY KEY, payload BLOB NOT NULL)",
        """CREATE TABLE IF NOT EXISTS updates (round INTEGER, client TEXT, offer TEXT NOT NULL, payload BLOB NOT NULL,
                                               PRIMARY KEY (round, client))""",
        "CREATE TABLE IF NOT EXISTS offers   (client TEXT PRIMARY KEY, offer TEXT NOT NULL)",
        """CREATE TABLE IF NOT EXISTS chunks  (client TEXT, sha256 TEXT, n INTEGER, payload BLOB NOT NULL,
                                               PRIMARY KEY (client, sha256, n))""",
    ),
    # 2: how far an update moves, what is to be recorded, and what was refused.
    (
        "ALTER TABLE updates ADD COLUMN norm REAL",
        "CREATE TABLE events   (n INTEGER PRIMARY KEY AUTOINCREMENT, event TEXT NOT NULL)",
        "CREATE TABLE refusals (code TEXT PRIMARY KEY, count INTEGER NOT NULL)",
    ),
    # 3: a row for each member. Of updates, the round whose merge takes them and the round that they were trained in,
    # and norms before payloads, so that to read one is not to read both. Of uploads under way, what they take.
    (
        "CREATE TABLE members (name TEXT PRIMARY KEY, row TEXT NOT NULL)",
        "ALTER TABLE updates RENAME TO former",
        """CREATE TABLE updates (round INTEGER, client TEXT, trained INTEGER, norm REAL, offer TEXT NOT NULL,
                                 payload BLOB NOT NULL, PRIMARY KEY (round, client, trained))""",
        "INSERT INTO updates SELECT round, client, round, norm, offer, payload FROM former ORDER BY rowid",
        "DROP TABLE former",
        "ALTER TABLE offers RENAME TO former",
        """CREATE TABLE offers  (client TEXT PRIMARY KEY, version INTEGER NOT NULL, size INTEGER NOT NULL,
                                 offer TEXT NOT NULL)""",
        """INSERT INTO offers SELECT client, json_extract(offer, '$.version'), json_extract(offer, '$.blob.size'), offer
           FROM former""",
        "DROP TABLE former",
    ),
)


def migrate(db: sqlite3.Connection) -> None:
    """Bring an open store, or an empty file, to the newest layout.

    Raises:
        ConfigError: the file is of a newer version, or no store of ours.
        sqlite3.Error: it is no database, or cannot be written.
    """
    had = int(db.execute("PRAGMA user_version").fetchone()[0])
    check(db, had)
    for number in range(had, len(MIGRATIONS)):
        db.execute("BEGIN IMMEDIATE")
        try:
            for statement in MIGRATIONS[number]:
                db.execute(statement)
            # A pragma takes no parameters; both numbers are ours.
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {number + 1}")
        except BaseException:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")


def check(db: sqlite3.Connection, had: int) -> None:
    """Refuse a file that this version must not touch; `had` is its count of migrations.

    Raises:
        ConfigError: the file is of a newer version, or no store of ours.
    """
    application = int(db.execute("PRAGMA application_id").fetchone()[0])
    if application not in {0, APPLICATION_ID}:
        raise ConfigError(
            f"a fleet's store was expected; found a database of another program (application id {application:#x}); "
            "check the path"
        )
    if had > len(MIGRATIONS):
        raise ConfigError(
            f"the store has layout {had}, and this version knows layouts up to {len(MIGRATIONS)}; "
            "install the newer edge-runtime that wrote it, or restore a backup from before"
        )
