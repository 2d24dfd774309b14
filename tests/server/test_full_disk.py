"""A server whose disk is full: it refuses, keeps what it has, and goes on by itself when there is room."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from edge_runtime.cli import shell
from edge_runtime.errors import DiskFullError
from edge_runtime.wire import blobs
from edge_runtime.wire.ledger import Ledger
from edge_runtime.wire.messages import Offer, Rejected, Report
from server import backup
from server.shortage import RETRY_SECONDS
from server.store import Standing, Store
from tests.runtime.said import hello, offer
from tests.server.bench import Bench, Hand, accepted, training
from tests.server.secrets import Secrets


def fill(bench: Bench) -> None:
    """No page more, as on a disk that is full."""
    [(pages,)] = bench.store._db.execute("PRAGMA page_count").fetchall()
    bench.store._db.execute(f"PRAGMA max_page_count = {pages}")


def make_room(bench: Bench) -> None:
    bench.store._db.execute("PRAGMA max_page_count = 1000000")
    bench.clock.now += RETRY_SECONDS + 1
    bench.service.tick()


def big(bench: Bench) -> tuple[Hand, Hand, Offer, bytes]:
    """Two devices, and an upload of which every chunk needs pages."""
    first, second = training(bench)
    offered, payload = first.offer_of(os.urandom(40_000))
    return first, second, offered.model_copy(update={"blob": blobs.describe(payload, 20_000)}), payload


def test_what_does_not_fit_is_refused_for_now_and_taken_when_there_is_room(bench: Bench) -> None:
    first, second = training(bench)
    done = second.train()
    second.deliver(*done)
    offered, payload = first.train()
    first.say(offered)
    fill(bench)
    heard = first.send(offered, payload)
    refusals = [message for message in heard if isinstance(message, Rejected)]
    if refusals:  # a small chunk may still find room in a page that is there
        assert [(message.code, message.sha256) for message in refusals] == [("no-space", offered.blob.sha256)]
    assert second.say(done[0]) == [accepted(done[0])], "what is stored is kept"
    make_room(bench)
    assert first.say(offered)
    first.send(offered, payload)
    assert bench.service.state.version == 1
    assert {layer["updates"] for r in bench.records if r["event"] == "merge" for layer in r["layers"].values()} == {2}


def test_nobody_is_given_up_while_the_disk_is_full_and_nothing_that_is_said_once_is_lost(make) -> None:
    bench = make("rounds.progress_timeout=60", "wire.max_upload_bytes=1000000")
    first, second, huge, payload = big(bench)
    second.deliver(*second.train())
    first.say(huge)
    fill(bench)
    heard = first.send(huge, payload)
    assert [message.code for message in heard if isinstance(message, Rejected)] == ["no-space"], "told once"
    for _ in range(100):
        bench.clock.now += 5
        bench.service.tick()
    assert bench.service.state.round == 1, "it is not the devices that do not move"
    assert sum("no room" in note for note in bench.notes) == 1, "said once"
    make_room(bench)
    assert any("room on the disk again" in note for note in bench.notes)


def test_a_report_that_cannot_be_stored_is_held_back_and_not_acknowledged(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = training(bench)

    def full(_state: str) -> None:
        raise DiskFullError("no room on the disk")

    with monkeypatch.context() as patch:
        patch.setattr(bench.store, "save_rounds", full)
        assert first.say(Report(client="a", state="failed", round=1, detail="because")) == []
        assert "a" not in bench.service.state.ended
        bench.clock.now += RETRY_SECONDS + 1
        bench.service.tick()
        assert "a" not in bench.service.state.ended
    bench.clock.now += RETRY_SECONDS + 1
    bench.service.tick()
    assert bench.service.state.ended["a"].detail == "because"
    assert not bench.broker._exchange.session("server").unacknowledged


@pytest.mark.parametrize("write", ["save_rounds", "retire"])
def test_a_start_and_a_session_that_begins_while_the_disk_is_full_end_no_server(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    first, second = training(bench)

    def full(*_arguments: object, **_facts: object) -> None:
        raise DiskFullError("no room on the disk")

    turns = iter(["lose", "listen", "stop"])

    def stop() -> bool:
        turn = next(turns)
        if turn == "lose":
            bench.transport.drop()
            bench.transport.resume()
        return turn == "stop"

    with monkeypatch.context() as patch:
        patch.setattr(bench.store, write, full)
        bench.service.run(stop, poll=0.0)
    make_room(bench)
    assert any("room on the disk again" in note for note in bench.notes)
    first.deliver(*first.train())
    second.deliver(*second.train())
    assert bench.service.state.version == 1


def test_a_server_that_has_no_room_for_a_number_to_sign_with_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = Secrets(tmp_path / "secrets", "a", "b")
    guard = secrets.of_server()

    def full(_now: int) -> None:
        raise DiskFullError("no room on the disk")

    with monkeypatch.context() as patch:
        patch.setattr(guard._ledger, "_reserve", full)
        bench = Bench(tmp_path, guard=guard)
        hands = [Hand(bench, name, guard=secrets.of_device(name)) for name in ("a", "b")]
        assert hands[0].say(hello("a")) == []
        assert hands[0].say(hello("a")) == []
    make_room(bench)
    for hand in hands:
        hand.say(hello(hand.name))
    assert bench.directive.phase == "train"


def test_a_merge_that_does_not_fit_is_made_when_there_is_room(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = training(bench)
    first.deliver(*first.train())

    def full(*_arguments: object, **_facts: object) -> None:
        raise DiskFullError("no room on the disk")

    with monkeypatch.context() as patch:
        patch.setattr(bench.store, "save_version", full)
        offered, payload = second.train()
        assert accepted(offered) in second.deliver(offered, payload)
        assert (bench.service.state.phase, bench.service.state.version) == ("merging", 0)
    make_room(bench)
    assert (bench.service.state.round, bench.service.state.version) == (2, 1)
    assert [record["event"] for record in bench.records] == ["update", "update", "merge"]


def test_events_wait_in_the_store_while_their_file_has_no_room_and_come_once(
    make: Callable[..., Bench], tmp_path: Path
) -> None:
    bench, room = make(), [False]
    kept: list[object] = []

    def record(event: object) -> None:
        if not room[0]:
            raise OSError(28, "No space left on device")
        kept.append(event)

    bench.service._journal._record = record
    first, second = training(bench)
    first.deliver(*first.train())
    second.deliver(*second.train())
    assert bench.service.state.version == 1
    assert kept == []
    assert sum("cannot be recorded" in note for note in bench.notes) == 1
    room[0] = True
    bench.clock.now += 1
    bench.service.tick()
    bench.service.tick()
    assert [event["n"] for event in kept] == [1, 2, 3]  # type: ignore[index]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for a megabyte or two."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_store_on_a_disk_that_is_really_full_keeps_all_that_it_said_it_has(small_disk: Path, tmp_path: Path) -> None:
    store, stored = Store(small_disk / "store"), 0
    full: DiskFullError | None = None
    while full is None and stored < 1000:
        try:
            store.accept(
                offer("a", stored + 1, payload=b"abcd"), os.urandom(20_000), Standing(json.dumps({"round": stored + 1}))
            )
            stored += 1
        except DiskFullError as error:
            full = error
    assert "make room there" in str(full)
    assert 5 < stored < 999
    for _ in range(3):
        with pytest.raises(DiskFullError):
            store.accept(offer("a", stored + 1, payload=b"abcd"), os.urandom(400_000), Standing("{}"))
        assert store.rounds() == json.dumps({"round": stored})
    with pytest.raises(DiskFullError, match="no room"):
        backup.backup(small_disk / "store", small_disk / "copy")
    assert not list(small_disk.glob("copy*"))
    backup.backup(small_disk / "store", tmp_path / "elsewhere.backup")
    store.close()
    again = Store(small_disk / "store")
    assert again.rounds() == json.dumps({"round": stored})
    assert [number for number in range(1, 1000) if list(again.updates(number))] == list(range(1, stored + 1))
    again.close()


def test_signing_needs_no_room_and_what_was_taken_is_written_down_when_there_is_some(small_disk: Path) -> None:
    now = 1_790_000_000_000_000
    path = small_disk / "ledger"
    ledger = Ledger(path, lambda: now)
    drawn = [ledger.draw()]
    ledger.take("k", "up", 1)
    with suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))
    for turn in range(2000):
        now += 1_000_000
        drawn.append(ledger.draw())
        ledger.take(f"{turn:016x}", "up", 5)
    ledger.take("k", "up", 7)
    assert drawn == sorted(set(drawn))
    assert ledger.highest("k", "up") == 7
    (small_disk / "ballast").unlink()
    ledger.take("l", "up", 3)
    ledger.close()
    again = Ledger(path, lambda: now)
    assert [again.highest(key, "up") for key in ("k", "l", f"{1999:016x}")] == [7, 3, 5]
    assert again.draw() > drawn[-1]
    again.close()


def test_a_record_on_a_full_disk_has_no_half_lines(small_disk: Path) -> None:
    path = small_disk / "metrics.jsonl"
    record = shell.recorder(path)
    events = ({"event": "x" * 1000, "n": number} for number in range(1, 100_000))
    with pytest.raises(OSError, match="No space"):
        list(map(record, events))
    lines = path.read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\n") for line in lines)
    path.write_bytes(b"".join(lines[:10]) + b'{"event": "half')
    record = shell.recorder(path)
    record({"event": "again", "n": 10})
    record({"event": "new", "n": 11})
    assert len(path.read_bytes().splitlines()) == 11
