"""Adapters on disk: the same bits, made when they are asked for, gone with whoever had them; and a full disk."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from edge_runtime.errors import DiskFullError
from edge_runtime.lora.adapter import Adapter, Deferred, joined, remembering
from edge_runtime.wire.messages import Rejected
from server import aggregators
from server.aggregators.method import save_state
from server.scratch import Scratch
from server.shortage import RETRY_SECONDS
from tests.runtime.fleets import in_memory
from tests.server.bench import Bench, accepted, training
from tests.server.merging import LAYER, SHAPES, learnt_state, updates_from
from tests.strategies import adapters, gaussian, laws


@laws
@given(adapters())
def test_what_is_put_comes_back_bit_for_bit(adapter: Adapter) -> None:
    with in_memory() as folder:
        room = Scratch(folder, memory=0)
        kept, again = room.put(adapter), room.put(adapter)

        assert kept.digest() == again.digest() == adapter.digest()
        assert (kept.sizes, list(kept)) == (adapter.sizes, list(adapter))
        assert room.written == 2 * 4 * adapter.parameters
        assert not list(folder.iterdir()), "the file has no name"


def test_layers_are_made_each_time_and_small_adapters_stay_in_memory(tmp_path: Path) -> None:
    adapter = Adapter({"x": gaussian((5, 4), 2, 1), "y": gaussian((3, 4), 1, 2)})
    size = 4 * adapter.parameters
    room = Scratch(tmp_path, memory=size + 1)
    first, second = room.put(adapter), room.put(adapter)

    assert first is adapter
    assert isinstance(second.layers, Deferred)
    assert room.written == size
    assert second["x"] is not second["x"]
    assert second.only(["y", "z"]).sizes == {"y": (3, 4, 1)}
    assert "z" not in second
    with pytest.raises(KeyError):
        second["z"]


def test_the_layer_that_was_made_last_may_be_remembered(tmp_path: Path) -> None:
    adapter = Adapter({"x": gaussian((5, 4), 2, 1), "y": gaussian((3, 4), 1, 2)})
    kept = remembering(Scratch(tmp_path, memory=0).put(adapter))

    first = kept["x"]
    assert kept["x"] is first
    np.testing.assert_array_equal(kept["y"].a, adapter["y"].a)
    assert kept["x"] is not first
    assert remembering(adapter) is adapter


def test_the_file_is_closed_with_the_last_adapter_that_is_in_it(tmp_path: Path) -> None:
    def open_files() -> int:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files()
    kept = Scratch(tmp_path, memory=0).put(Adapter({"x": gaussian((5, 4), 2, 1)}))
    both = joined([kept, Adapter({"y": gaussian((5, 4), 2, 2)})])
    del kept
    assert open_files() == before + 1
    np.testing.assert_array_equal(both["x"].a, gaussian((5, 4), 2, 1).a)
    assert both.ranks == {"x": 2, "y": 2}
    del both
    assert open_files() == before


@pytest.mark.parametrize("name", sorted(aggregators.METHODS))
def test_a_merge_from_disk_to_disk_has_the_bits_of_one_in_memory(name: str, tmp_path: Path) -> None:
    method, state, room = aggregators.build(name), learnt_state(8), Scratch(tmp_path, memory=0)
    updates = updates_from(state, method, [2, 8, 5])
    stored = [replace(u, received=room.put(u.received), trained=room.put(u.trained)) for u in updates]
    below = replace(state, adapter=room.put(state.adapter), keep=room.put)

    merged = method.combine(below, stored)

    assert isinstance(merged.state.adapter.layers, Deferred)
    assert save_state(merged.state) == save_state(method.combine(state, updates).state)


def test_a_layer_that_nobody_trained_stays_and_so_does_its_tail(tmp_path: Path) -> None:
    method, state = aggregators.build("increment"), learnt_state(8)
    state = method.combine(state, updates_from(state, method, [8, 8])).state
    [update] = updates_from(state, method, [4])
    part = replace(update, trained=update.trained.only([LAYER]))
    room = Scratch(tmp_path, memory=0)

    merged = method.combine(replace(state, keep=room.put), [part]).state

    assert set(state.tail) == set(SHAPES)
    other = next(name for name in SHAPES if name != LAYER)
    for before, after in ((state.adapter, merged.adapter), (state.tail, merged.tail)):
        assert after.only([other]).digest() == before.only([other]).digest()
        assert after.only([LAYER]).digest() != before.only([LAYER]).digest()


# ── in the service ────────────────────────────────────────────────────────────────────────────────────────────────


def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays in memory."""
    for module in ("server.merging", "server.downlink"):
        monkeypatch.setattr(f"{module}.Scratch", partial(Scratch, memory=0))


def rounds_of(bench: Bench, count: int) -> bytes:
    """The state after so many rounds of two devices."""
    hands = training(bench)
    for _ in range(count):
        for hand in hands:
            hand.deliver(*hand.train())
    found = bench.store.version(count)
    assert found is not None
    return found.state


@pytest.mark.parametrize("method", ["increment", "svd"])
def test_a_fleet_whose_merges_do_not_fit_into_memory_ends_in_the_same_bytes(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for place in ("memory", "disk"):
        if place == "disk":
            on_disk(monkeypatch)
        bench = Bench(tmp_path / place, f"aggregator.method={method}")
        states.append(rounds_of(bench, 2))
        assert sorted(path.name for path in (tmp_path / place / "server").iterdir() if "fleet" not in path.name) == []
        bench.store.close()
    assert states[0] == states[1]


def full(*_arguments: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_update_is_not_judged_without_room_for_the_version_it_belongs_to(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make()
    first, second = training(bench)
    on_disk(monkeypatch)
    offered, payload = first.train()
    with monkeypatch.context() as patch:
        patch.setattr("server.scratch.os.pwrite", full)
        refused = first.deliver(offered, payload)
        assert [message.code for message in refused if isinstance(message, Rejected)] == ["no-space"]
        assert any("no room for a merge" in note for note in bench.notes)
    bench.clock.now += RETRY_SECONDS + 1
    bench.service.tick()
    assert first.say(offered) == [accepted(offered)], "its chunks are here"
    second.deliver(*second.train())
    assert bench.service.state.version == 1


@pytest.mark.parametrize("restart", [False, True])
def test_a_merge_without_room_waits_for_some_and_happens_once(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, restart: bool
) -> None:
    bench = make()
    first, second = training(bench)
    first.deliver(*first.train())
    work = second.train()
    monkeypatch.setattr("server.merging.Scratch", partial(Scratch, memory=0))
    with monkeypatch.context() as patch:
        patch.setattr("server.scratch.os.pwrite", full)
        second.deliver(*work)
        bench.clock.now += RETRY_SECONDS + 1
        bench.service.tick()
        assert (bench.service.state.phase, bench.service.state.version) == ("merging", 0)
        assert any("no room for a merge" in note for note in bench.notes)
    if restart:
        bench.restart()
    else:
        bench.clock.now += RETRY_SECONDS + 1
        bench.service.tick()
    assert (bench.service.state.round, bench.service.state.version) == (2, 1)
    bench.wait()
    assert sum(record["event"] == "merge" for record in bench.records) == 1


def test_another_error_of_the_disk_is_not_called_a_full_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    adapter = Adapter({"x": gaussian((5, 4), 2, 1)})
    room = Scratch(tmp_path, memory=0)
    kept = room.put(adapter)
    monkeypatch.setattr("server.scratch.os.pwrite", broken)
    with pytest.raises(OSError, match="Input/output"):
        room.put(adapter)
    monkeypatch.setattr("server.scratch.os.preadv", lambda *_: 0)
    with pytest.raises(OSError, match="ends early"):
        kept["x"]
    with pytest.raises(OSError, match="No such file"):
        Scratch(tmp_path / "nowhere", memory=0).put(adapter)


def test_a_folder_without_room_for_a_file_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def over_quota(**_arguments: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("server.scratch.tempfile.TemporaryFile", over_quota)
    with pytest.raises(DiskFullError, match="make room there"):
        Scratch(tmp_path, memory=0).put(Adapter({"x": gaussian((5, 4), 2, 1)}))
