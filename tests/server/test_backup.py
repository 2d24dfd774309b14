"""Backup while the server works, restore, and what becomes of the fleet."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime.cli import run
from edge_runtime.errors import ConfigError
from edge_runtime.wire import blobs
from edge_runtime.wire.messages import Band, Rejected
from server import backup
from server.store import FILE, Standing, Store, StoredVersion
from tests.runtime.fleets import BRISK, PAIR, fleet_in
from tests.runtime.said import offer
from tests.server.bench import Bench, Hand, accepted, training


def test_a_backup_is_one_moment_of_a_store_that_is_written_to_all_the_time(tmp_path: Path) -> None:
    """Version, state and update of one number are written together, so every backup must have all of one number."""
    store, done = Store(tmp_path / "store"), threading.Event()
    taken: list[Path] = []

    def copy() -> None:
        try:
            for number in range(12):
                backup.backup(tmp_path / "store", tmp_path / f"{number}.backup")
                taken.append(tmp_path / f"{number}.backup")
        finally:
            done.set()

    copying = threading.Thread(target=copy)
    copying.start()
    number = 0
    while not done.is_set():
        number += 1
        payload = f"band of {number}".encode() * 500
        band = Band(start=0, stop=4, blob=blobs.describe(payload))
        store.accept(offer("a", number, payload=b"abcd"), b"abcd", Standing(f'{{"round": {number}}}'))
        store.save_version(
            StoredVersion(number, b"state" * 100, (band,)),
            [payload],
            Standing(f'{{"round": {number}, "phase": "train"}}'),
        )
    copying.join()
    store.close()
    assert len(taken) == 12
    for path in taken:
        db = sqlite3.connect(path)
        [(versions,)] = db.execute("SELECT COUNT(*) FROM versions").fetchall()
        [(updates,)] = db.execute("SELECT COUNT(*) FROM updates").fetchall()
        row = db.execute("SELECT state FROM rounds").fetchone()
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        db.close()
        state = json.loads(row[0]) if row else {"round": 0, "phase": "train"}
        accepted_only = "phase" not in state
        assert state["round"] == versions + accepted_only == updates
        assert {found.name for found in tmp_path.iterdir() if found.name.startswith(path.name)} == {path.name}


@pytest.fixture
def restored(make: Callable[..., Bench], tmp_path: Path) -> tuple[Bench, list[Hand]]:
    """A fleet backed up in its first round with one update stored; it went on to its second, and lost it all."""
    bench = make("rounds.num_rounds=3")
    first, second = hands = training(bench)
    first.deliver(*first.train())
    backup.backup(bench.folder / "server", tmp_path / "fleet.backup")
    second.deliver(*second.train())
    assert bench.service.state.round == 2
    bench.store.close()
    backup.restore(tmp_path / "fleet.backup", bench.folder / "server", replace=True)
    return bench, hands


def test_a_restored_fleet_is_another_life_in_the_round_of_the_backup(restored) -> None:
    bench, _ = restored
    before = bench.service.state
    bench.begin()
    after = bench.service.state
    assert after.run != before.run
    assert (after.phase, after.round, after.version, set(after.stored)) == ("train", 1, 0, {"a"})
    assert bench.directive.run == after.run, "devices hear of it"


def test_what_devices_still_say_of_the_former_life_is_refused(restored) -> None:
    """Of rounds and versions whose numbers come again: an offer that waited in the broker must not be taken."""
    bench, (first, second) = restored
    old = bench.directive
    late, payload = second.train(old)
    late = late.model_copy(update={"run": old.run})
    bench.begin()
    for offered in (late, late.model_copy(update={"round": 1, "version": 0})):
        [refusal] = second.say(offered)
        assert isinstance(refusal, Rejected)
        assert (refusal.code, refusal.sha256) == ("round-closed", late.blob.sha256)
    # The update that the backup holds counts once: its device, which forgot it, is told so.
    again, _ = first.offer_of(b"another")
    [refusal] = first.say(again)
    assert isinstance(refusal, Rejected)
    assert "stored already" in refusal.reason
    fresh, payload = second.train()
    assert second.deliver(fresh, payload) == [accepted(fresh)]
    assert (bench.service.state.round, bench.service.state.version) == (2, 1)


def test_a_fleet_goes_on_after_a_restore_and_finishes(folder: Path) -> None:
    """Real clients, whose settled rounds are ahead of the backup: they follow, and every round ends."""
    fleet = fleet_in(folder, "fleet", *BRISK, "rounds.num_rounds=4", "wire.codec_up=fp32")
    fleet.run(until=lambda: fleet.state is not None and fleet.state.round == 2)
    backup.backup(fleet.folder / "server", folder / "fleet.backup")
    fleet.run(until=lambda: fleet.state is not None and fleet.state.round == 4)
    fleet.leave("server")
    backup.restore(folder / "fleet.backup", fleet.folder / "server", replace=True)
    merges = len(fleet.merges())
    fleet.join("server")
    fleet.run(sweeps=2000)
    assert fleet.state is not None
    assert (fleet.state.phase, fleet.state.version) == ("over", 4)
    assert {number for number, _ in fleet.merges()[merges:]} >= {3, 4}
    assert {updates for _, updates in fleet.merges()} == {len(PAIR)}, "nothing is counted twice"
    assert set(fleet.delivered) == set(PAIR)


def test_restoring_refuses_what_would_lose_something(make: Callable[..., Bench], tmp_path: Path) -> None:
    bench, file = make(), tmp_path / "fleet.backup"
    training(bench)
    backup.backup(bench.folder / "server", file)
    with pytest.raises(ConfigError, match="is using it"):
        backup.restore(file, bench.folder / "server", replace=True)
    bench.store.close()
    with pytest.raises(ConfigError, match="--replace"):
        backup.restore(file, bench.folder / "server")
    backup.restore(file, bench.folder / "server", replace=True)
    kept = bench.folder / "server" / f"{FILE}.before-restore"
    assert kept.exists(), "what was there is kept"
    bench.begin()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "found none"), (b"no database" * 99, "could not be restored"), (b"", "could not be restored")],
)
def test_what_is_no_backup_is_refused_and_leaves_the_store_alone(tmp_path: Path, content, message) -> None:
    store = Store(tmp_path / "store")
    store.save_rounds(Standing("here"))
    store.close()
    file = tmp_path / "file"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        backup.restore(file, tmp_path / "store", replace=True)
    store = Store(tmp_path / "store")
    assert store.rounds() == "here"
    store.close()


def test_a_damaged_backup_is_refused(make: Callable[..., Bench], tmp_path: Path) -> None:
    bench, file = make(), tmp_path / "fleet.backup"
    training(bench)
    backup.backup(bench.folder / "server", file)
    spoilt = bytearray(file.read_bytes())
    spoilt[len(spoilt) // 2 : len(spoilt) // 2 + 3000] = b"\xff" * 3000
    file.write_bytes(spoilt)
    with pytest.raises(ConfigError, match=r"damaged|could not be restored"):
        backup.restore(file, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere" / FILE).exists()


def test_the_command_does_both(make: Callable[..., Bench], tmp_path: Path) -> None:
    bench = make()
    training(bench)
    out = tmp_path / "backups" / "fleet.backup"
    assert run(["backup", "--store", str(bench.folder / "server"), "--out", str(out)]) == 0
    assert run(["restore", str(out), "--store", str(tmp_path / "new")]) == 0
    store = Store(tmp_path / "new")
    assert store.rounds() != bench.store.rounds()
    store.close()
    assert run(["restore", str(out), "--store", str(tmp_path / "new")]) == 2
    assert run(["restore", str(out), "--store", str(tmp_path / "new"), "--replace"]) == 0
    assert run(["backup", "--store", str(tmp_path / "nothing"), "--out", str(out)]) == 2


def test_what_a_backup_holds_is_said_in_a_line(make: Callable[..., Bench], tmp_path: Path) -> None:
    bench = make()
    first, _ = training(bench)
    first.deliver(*first.train())
    found = backup.backup(bench.folder / "server", tmp_path / "fleet.backup")
    size = (tmp_path / "fleet.backup").stat().st_size
    assert str(found) == f"phase 'train', round 1, version 0, 1 updates, {size} bytes"
