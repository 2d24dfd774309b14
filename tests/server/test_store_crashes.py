"""A server killed at every SQL statement of a fleet's life: the same bytes, each update once, each event once."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.fleets import BRISK, check_undisturbed, fleet_in
from tests.runtime.turns import Fleet, Killed

READS = ("SELECT", "PRAGMA", "BEGIN", "ROLLBACK")
"""A kill before one of these is a kill before the next that writes."""


class Fuse:
    """Counts the statements that write to servers' stores, and kills the server before one of them.

    Once it is dead nothing of it reaches the file any more: what was not committed is rolled back, as by the next
    process that opens it.
    """

    def __init__(self) -> None:
        self.at, self.seen, self.dead = 0, 0, False

    def burn(self, statement: str) -> None:
        if not self.dead and not statement.lstrip().upper().startswith(READS):
            self.seen += 1
            self.dead = self.seen == self.at
        if self.dead:
            raise Killed(statement)


@contextmanager
def fused(monkeypatch: pytest.MonkeyPatch, fuse: Fuse) -> Iterator[None]:
    class Connection(sqlite3.Connection):
        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
            fuse.burn(statement)
            return super().execute(statement, *values)

        def executemany(self, statement: str, rows: Any) -> sqlite3.Cursor:
            fuse.burn(statement)
            return super().executemany(statement, rows)

    open_any: Callable[..., sqlite3.Connection] = sqlite3.connect

    def connect(path: Any, **kwargs: Any) -> sqlite3.Connection:
        if Path(path).name != "fleet.db":
            return open_any(path, **kwargs)
        fuse.dead = False  # another process
        return open_any(path, factory=Connection, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("edge_runtime.database.sqlite3.connect", connect)
        yield


def recorded(fleet: Fleet) -> list[tuple[Any, ...]]:
    """(event, round, device) of what the store gave to be recorded, each number once."""
    once = {record["n"]: record for record in fleet.records if "n" in record}
    return sorted((event["event"], event["round"], event.get("client", "")) for event in once.values())


WHOLE_LIFE = sorted(
    [("merge", number, "") for number in (1, 2)] + [("update", number, who) for number in (1, 2) for who in "ab"]
)


@pytest.mark.parametrize("part", range(6))
def test_a_kill_before_any_statement_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    fuse = Fuse()
    with fused(monkeypatch, fuse):
        fleet = fleet_in(folder, "calm", *BRISK).run()
        statements = fuse.seen
        assert recorded(fleet) == WHOLE_LIFE
        assert statements > 60
        for at in range(1 + part, statements + 1, 6):
            fuse.at, fuse.seen = at, 0
            fleet = fleet_in(folder, f"killed-{at}", *BRISK)
            fleet.with_will = bool(at % 4 < 2)
            fleet.run()
            assert len(fleet.kills) == 1
            fuse.at = 0
            check_undisturbed(fleet)
            assert recorded(fleet) == WHOLE_LIFE, at
            shutil.rmtree(fleet.folder)
