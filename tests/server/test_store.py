"""The server's memory: all or nothing, whatever moment a crash chooses."""

from __future__ import annotations

import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.wire import blobs
from edge_runtime.wire.messages import Band
from server.store import Standing, Store, StoredVersion
from tests.runtime.said import offer

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "store")
    yield opened
    opened.close()


def version(number: int, *payloads: bytes) -> StoredVersion:
    """A version with one band for each payload."""
    bands = tuple(
        Band(start=index, stop=index + 1, blob=blobs.describe(payload)) for index, payload in enumerate(payloads)
    )
    return StoredVersion(number, f"state {number}".encode(), bands)


def after_a_crash(folder: Path, copy: Path) -> Store:
    """The store as it would be found if its process died now: the files as they are, without an orderly close."""
    shutil.copytree(folder, copy)
    return Store(copy)


def test_a_new_store_is_empty(store: Store) -> None:
    assert store.rounds() is None
    assert store.version(0) is None
    assert store.blob("0" * 64) is None
    assert store.offer_of("a") is None
    assert list(store.updates(1)) == []
    assert store.retire(0) == []


def test_what_a_method_returned_from_survives_a_crash(store: Store, tmp_path: Path) -> None:
    kept = version(1, b"band 0", b"band 1")
    update, other = offer("a", payload=b"abcdefgh"), offer("b")
    store.save_rounds(Standing("before"))
    store.save_version(kept, [b"band 0", b"band 1"], Standing("after the merge"))
    store.offered(update)
    store.accept(update, b"abcdefgh", Standing("after the update"))
    store.offered(other)
    store.add_chunk(other, 1, b"pdat")
    found = after_a_crash(tmp_path / "store", tmp_path / "copy")
    assert found.rounds() == "after the update"
    assert found.version(1) == kept
    assert found.blob(kept.bands[1].blob.sha256) == b"band 1"
    assert list(found.updates(1)) == [(update, b"abcdefgh")]
    assert found.offer_of("a") is None
    assert found.offer_of("b") == other
    assert found.chunks(other) == {1: b"pdat"}
    found.close()


def test_a_version_its_bands_and_the_rounds_are_saved_together_or_not_at_all(store: Store, tmp_path: Path) -> None:
    """The second payload is of a kind that SQLite refuses, in the middle of the transaction."""
    store.save_rounds(Standing("before"))
    with pytest.raises(sqlite3.Error):
        store.save_version(version(1, b"good", b"bad"), [b"good", object()], Standing("after"))  # type: ignore[list-item]
    for found in (store, after_a_crash(tmp_path / "store", tmp_path / "copy")):
        assert found.rounds() == "before"
        assert found.version(1) is None
        assert found.blob(blobs.digest(b"good")) is None
    found.close()
    store.save_version(version(1, b"good"), [b"good"], Standing("after"))
    assert store.rounds() == "after", "a transaction that failed is not in the way of the next"


def test_an_update_and_the_rounds_are_saved_together_or_not_at_all(store: Store) -> None:
    update = offer("a", payload=b"abcd")
    store.offered(update)
    store.add_chunk(update, 0, b"abcd")
    with pytest.raises(sqlite3.Error):
        store.accept(update, b"abcd", Standing(object()))  # type: ignore[arg-type]
    assert list(store.updates(1)) == []
    assert store.chunks(update) == {0: b"abcd"}
    assert store.offer_of("a") == update


CRASHER = """
import sys
from pathlib import Path
from server.store import Standing, Store, StoredVersion
from edge_runtime.wire import blobs
from edge_runtime.wire.messages import Band
from tests.runtime.said import offer

store = Store(Path(sys.argv[1]))
start = int(store.rounds() or 0)
print("open", flush=True)
for number in range(start + 1, 100000):
    payloads = [f"band {index} of {number}".encode() * 200 for index in range(4)]
    bands = tuple(Band(start=i, stop=i + 1, blob=blobs.describe(p)) for i, p in enumerate(payloads))
    update = offer("a", number, payload=b"abcdefgh")
    store.offered(update)
    for chunk in (0, 1):
        store.add_chunk(update, chunk, b"abcdefgh"[4 * chunk : 4 * chunk + 4])
    store.accept(update, b"abcdefgh", Standing(str(number - 1)))
    store.save_version(StoredVersion(number, b"state" * 1000, bands), payloads, Standing(str(number)))
    store.retire(number - 2)
    print(number, flush=True)
"""
"""A server in a hurry: for each number an update, the version that it makes, and the rounds that say so."""


def test_a_process_killed_at_any_moment_leaves_a_store_from_which_the_next_goes_on(tmp_path: Path) -> None:
    folder, draw = tmp_path / "store", random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", CRASHER, str(folder)], stdout=subprocess.PIPE, text=True, cwd=PROJECT
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            time.sleep(draw.uniform(0.02, 0.2))
            process.send_signal(signal.SIGKILL)
            said = [line for line in process.stdout if line.endswith("\n")]
        check_crashed(folder, int(said[-1]) if said else 0)


def check_crashed(folder: Path, said: int) -> None:
    """Nothing that was said is missing, and nothing is there in part."""
    store = Store(folder)
    last = int(store.rounds() or 0)
    assert last >= said
    for number in range(max(1, last - 1), last + 1):
        kept = store.version(number)
        assert kept is not None
        assert len(kept.state) == 5000
        assert all(blobs.digest(store.blob(band.blob.sha256) or b"") == band.blob.sha256 for band in kept.bands)
    assert store.version(last + 1) is None, "a version without the rounds that know it"
    begun = list(store.updates(last + 1))
    assert len(begun) <= 1
    assert not begun or store.offer_of("a") is None, "an update that is accepted and under way at once"
    store.close()


# ── one opener ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_opener_is_refused_and_the_first_goes_on(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be used .*stop the other server, or choose another folder"):
        Store(tmp_path / "store")
    store.save_rounds(Standing("still mine"))
    assert store.rounds() == "still mine"


def test_after_close_another_may_open(tmp_path: Path) -> None:
    first = Store(tmp_path)
    first.save_rounds(Standing("mine"))
    first.close()
    second = Store(tmp_path)
    assert second.rounds() == "mine"
    second.close()


@pytest.mark.parametrize("kind", ["a file", "no database"])
def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "store"
    if kind == "a file":
        folder.write_text("not a folder")
    else:
        folder.mkdir()
        (folder / "fleet.db").write_bytes(b"no database" * 100)
    with pytest.raises(ConfigError, match=r"a server store was expected in .*which cannot be used"):
        Store(folder)


# ── uploads ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_upload_collects_chunks_and_twice_is_once(store: Store) -> None:
    update = offer("a", payload=b"abcdefgh")
    assert store.offered(update) == set()
    assert store.add_chunk(update, 1, b"efgh") == {1}
    assert store.add_chunk(update, 1, b"xxxx") == {1}
    assert store.offered(update) == {1}, "an offer that is said again goes on"
    assert store.add_chunk(update, 0, b"abcd") == {0, 1}
    assert store.chunks(update) == {0: b"abcd", 1: b"efgh"}


def test_a_device_has_one_upload_and_others_have_theirs(store: Store) -> None:
    first, second, other = offer("a", payload=b"first"), offer("a", payload=b"other"), offer("b", payload=b"first")
    for update in (first, other):
        store.offered(update)
        store.add_chunk(update, 0, b"firs")
    assert store.offered(second) == set()
    assert store.offer_of("a") == second
    assert store.chunks(first) == {}
    assert store.chunks(other) == {0: b"firs"}
    store.drop_upload(second)
    assert store.offer_of("a") is None
    assert store.offer_of("b") == other


def test_an_update_is_kept_once_and_its_upload_is_forgotten(store: Store) -> None:
    update = offer("a", payload=b"abcd")
    store.offered(update)
    store.add_chunk(update, 0, b"abcd")
    store.accept(update, b"abcd", Standing("one"))
    assert store.chunks(update) == {}
    store.accept(offer("a", payload=b"another"), b"another", Standing("two"))
    assert list(store.updates(1)) == [(update, b"abcd")]
    assert store.rounds() == "two"


def test_updates_come_by_round_in_order_of_the_devices_names(store: Store) -> None:
    for name in ("c", "a", "b"):
        store.accept(offer(name), name.encode(), Standing(""))
    store.accept(offer("a", 2), b"later", Standing(""))
    assert [(found.client, payload) for found, payload in store.updates(1)] == [("a", b"a"), ("b", b"b"), ("c", b"c")]
    assert [payload for _, payload in store.updates(2)] == [b"later"]


# ── retiring ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_retiring_forgets_blobs_and_updates_but_no_merged_state(store: Store) -> None:
    for number in (1, 2):
        store.save_version(version(number, f"band of {number}".encode()), [f"band of {number}".encode()])
        store.accept(offer("a", number), b"update", Standing(""))
    gone = store.retire(1)
    assert [ref.sha256 for ref in gone] == [blobs.digest(b"band of 1")]
    assert store.blob(gone[0].sha256) is None
    assert store.blob(blobs.digest(b"band of 2")) == b"band of 2"
    assert list(store.updates(1)) == []
    assert len(list(store.updates(2))) == 1
    kept = store.version(1)
    assert kept is not None
    assert kept.state == b"state 1"


def test_retiring_keeps_what_a_newer_version_shares(store: Store) -> None:
    """A band that no merge changed is the same blob in both."""
    store.save_version(version(1, b"shared", b"old"), [b"shared", b"old"])
    store.save_version(version(2, b"shared", b"new"), [b"shared", b"new"])
    assert [ref.sha256 for ref in store.retire(1)] == [blobs.digest(b"old")]
    assert store.blob(blobs.digest(b"shared")) == b"shared"
    store.save_version(version(3, b"other"), [b"other"])
    assert {ref.sha256 for ref in store.retire(2)} == {blobs.digest(b"shared"), blobs.digest(b"new")}


def test_a_retirement_that_a_crash_prevented_is_made_up_for(store: Store) -> None:
    for number in range(4):
        store.save_version(version(number, f"band of {number}".encode()), [f"band of {number}".encode()])
    assert [ref.sha256 for ref in store.retire(0)] == [blobs.digest(b"band of 0")]
    assert {ref.sha256 for ref in store.retire(2)} == {blobs.digest(b"band of 1"), blobs.digest(b"band of 2")}
    assert store.retire(2) == [], "twice is once"


def test_what_the_broker_should_not_keep_is_known_before_and_for_a_while_after_it_is_forgotten(store: Store) -> None:
    for number in range(5):
        store.save_version(version(number, f"band of {number}".encode()), [f"band of {number}".encode()])
    named = {number: blobs.digest(f"band of {number}".encode()) for number in range(5)}
    assert [ref.sha256 for ref in store.outdated(2, since=2)] == [named[0], named[1], named[2]], "all are still here"
    store.retire(2)
    assert [ref.sha256 for ref in store.outdated(2, since=1)] == [named[1], named[2]]
    assert [ref.sha256 for ref in store.outdated(3, since=3)] == [named[3]]
