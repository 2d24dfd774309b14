"""Large blobs of devices on disk: nothing but memory is changed by it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from simulation import journal
from simulation.engines.spread import as_it_is
from simulation.stored import Stored, whole
from simulation.work import Done, Task
from tests.simulation.fleets import events, run, world


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "LARGE", 1)


@pytest.mark.usefixtures("everything_is_large")
def test_what_is_on_disk_is_what_was_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kills = {40: "pi-0", 60: "server"}
    stored = run(tmp_path / "stored", kills=kills)
    monkeypatch.undo()
    kept = run(tmp_path / "kept", kills=kills)
    assert stored.finished, stored.why
    assert stored.adapter == kept.adapter
    assert events(tmp_path / "stored") == events(tmp_path / "kept")


@pytest.mark.usefixtures("everything_is_large")
def test_a_device_remembers_where_its_large_things_lie(tmp_path: Path) -> None:
    simulated = world(tmp_path)
    simulated.run()
    owed = [device.disk.owed for device in simulated._devices.values()]
    assert all(isinstance(each, Stored) for each in owed)


def test_devices_share_the_bytes_of_what_they_fetch(tmp_path: Path) -> None:
    simulated = world(tmp_path, "rounds.num_rounds=1")
    simulated.run()
    pi, other = (simulated._devices[name].disk.bands for name in ("pi-0", "pi-1"))
    assert pi.keys() == other.keys()
    assert pi
    assert all(pi[sha] is other[sha] for sha in pi)


@pytest.mark.usefixtures("everything_is_large")
def test_a_resumed_run_reads_them_from_the_former_one(tmp_path: Path) -> None:
    first = run(tmp_path)
    again = run(tmp_path)
    assert first.found == 0
    assert again.found == 6, "three devices in each of two rounds"
    assert first.adapter == again.adapter


def test_a_task_for_another_process_has_everything_at_hand() -> None:
    task = Task("pi", None, None, None, "plan", (), (), owed=Stored(lambda: b"owed"), kept=b"kept")  # type: ignore[arg-type]
    sent = pickle.loads(pickle.dumps(task.at_hand()))  # noqa: S301  of this test
    assert (sent.owed, sent.kept) == (b"owed", b"kept")
    assert whole(task.owed) == b"owed"
    assert whole(None) is None


def test_an_engine_without_a_journal_keeps_outcomes_as_they_are() -> None:
    done = Done(b"update", b"owed", None, {}, 1, 2.0, 1.0, 2.0)
    assert as_it_is("key", done) is done
