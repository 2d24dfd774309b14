"""The device's memory: what it returned from survives a crash, and an update is never half there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.state import DeviceState
from tests.runtime.said import offer


@pytest.fixture
def state(tmp_path: Path) -> Iterator[DeviceState]:
    opened = DeviceState(tmp_path / "device")
    yield opened
    opened.close()


def after_a_crash(folder: Path, copy: Path) -> DeviceState:
    """The state as it would be found if its process died now: the files as they are, without an orderly close."""
    shutil.copytree(folder, copy)
    return DeviceState(copy)


def test_a_new_device_remembers_nothing(state: DeviceState) -> None:
    assert (state.run, state.settled, state.outbox) == ("", 0, None)
    assert state.fact("loss_base") is None
    assert state.band("0" * 64) is None


def test_what_a_method_returned_from_survives_a_crash(state: DeviceState, tmp_path: Path) -> None:
    state.adopt("one")
    state.settle(2)
    state.put_fact("loss_base", 1.5)
    state.put_band("ab", b"band")
    state.put_outbox(offer("a", 3), b"update")
    found = after_a_crash(tmp_path / "device", tmp_path / "copy")
    assert (found.run, found.settled, found.outbox) == ("one", 2, (offer("a", 3), b"update"))
    assert found.fact("loss_base") == 1.5
    assert found.band("ab") == b"band"
    found.close()


def test_the_outbox_holds_the_newest_update(state: DeviceState) -> None:
    state.put_outbox(offer("a", 1), b"first")
    state.put_outbox(offer("a", 2), b"second")
    assert state.outbox == (offer("a", 2), b"second")


def test_settling_empties_the_outbox_and_remembers_the_round(state: DeviceState) -> None:
    state.put_outbox(offer("a", 2), b"update")
    state.settle(2)
    assert (state.outbox, state.settled) == (None, 2)


def test_what_is_owed_changes_only_once_the_update_is_accepted(state: DeviceState, tmp_path: Path) -> None:
    state.put_outbox(offer("a", 1), b"first", b"left of the first")
    assert [state.owed] == [None]
    state.settle(1)
    assert state.owed == b"left of the first"
    state.put_outbox(offer("a", 2), b"second", b"left of the second")
    assert state.owed == b"left of the first"
    found = after_a_crash(tmp_path / "device", tmp_path / "copy")
    found.settle(2)
    assert found.owed == b"left of the second"
    found.close()


def test_of_a_refused_update_nothing_is_owed_and_what_was_owed_before_still_is(state: DeviceState) -> None:
    state.put_outbox(offer("a", 1), b"first", b"left of the first")
    state.settle(1)
    state.put_outbox(offer("a", 2), b"second", b"left of the second")
    state.settle(2, arrived=False)
    assert state.owed == b"left of the first"
    state.put_outbox(offer("a", 3), b"third", b"left of the third")
    state.settle(3)
    assert state.owed == b"left of the third"


def test_an_update_without_feedback_leaves_nothing_owed(state: DeviceState) -> None:
    state.put_outbox(offer("a", 1), b"first", b"left of the first")
    state.settle(1)
    state.put_outbox(offer("a", 2), b"second")
    state.settle(2)
    assert state.owed is None


def test_settling_twice_is_settling_once(state: DeviceState) -> None:
    state.put_outbox(offer("a", 1), b"first", b"left of the first")
    state.settle(1)
    state.settle(1)
    assert state.owed == b"left of the first"


def test_settled_never_goes_back(state: DeviceState) -> None:
    state.settle(3)
    state.settle(1)
    assert state.settled == 3


def test_another_life_of_the_fleet_begins_with_nothing(state: DeviceState) -> None:
    state.adopt("one")
    state.settle(4)
    state.put_fact("loss_base", 1.5)
    state.put_band("ab", b"band")
    state.put_outbox(offer("a", 5), b"update", b"residual")
    state.settle(5)
    state.put_outbox(offer("a", 6), b"update", b"residual")
    state.adopt("two")
    assert (state.run, state.settled) == ("two", 0)
    found = [state.outbox, state.owed, state.fact("loss_base"), state.band("ab")]
    assert found == [None, None, None, None]


@pytest.mark.parametrize("value", [0, 1.25, "text", None, [1, 2], {"a": {"b": False}}])
def test_a_fact_comes_back_as_it_was(state: DeviceState, value: object) -> None:
    state.put_fact("some", "older")
    state.put_fact("some", value)
    assert state.fact("some") == value


def test_bands_that_no_version_needs_are_forgotten(state: DeviceState) -> None:
    for name in ("ab", "cd", "ef"):
        state.put_band(name, name.encode())
    state.keep_bands({"cd": 1}.keys())
    assert [state.band(name) for name in ("ab", "cd", "ef")] == [None, b"cd", None]
    state.keep_bands([])
    assert state.band("cd") is None


def test_a_second_client_is_refused_and_the_first_goes_on(state: DeviceState, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be used .*stop the other client, or choose another folder"):
        DeviceState(tmp_path / "device")
    state.put_fact("still", "mine")
    assert state.fact("still") == "mine"


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"a device state was expected in .*which cannot be used"):
        DeviceState(tmp_path / "file")


def test_what_a_device_knows_of_itself_outlives_the_fleet(tmp_path: Path) -> None:
    state = DeviceState(tmp_path)
    for name in ("memory_ceiling", "unfinished", "loss_base"):
        state.put_fact(name, 7)
    state.adopt("two")

    assert [state.fact(name) for name in ("memory_ceiling", "unfinished", "loss_base")] == [7, 7, None]
    state.close()
