"""Wherever layers are merged, the bytes are the same; and a worker that fails takes no merge with it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import socket
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from types import ModuleType

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from edge_runtime.config import Server
from edge_runtime.errors import AggregationError, ConfigError, EngineError, MissingExtraError
from edge_runtime.lora.adapter import Adapter, Pair
from server import aggregators, engines
from server.aggregators.increment import merge_layer
from server.aggregators.layers import Engine, LayerResult, LayerTask, Share
from server.aggregators.method import save_state
from server.engines.ahead import in_order
from tests.server.merging import learnt_state, updates_from

HAS_RAY = importlib.util.find_spec("ray") is not None
SHAPES = {f"model.layers.{index}.q_proj": (40 + index, 33) for index in range(6)}

needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is of the extra [ray]; see `make test-ray`")
every_other_engine = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=needs_ray if name == "ray" else ()) for name in engines.ENGINES if name != "local"],
)


def engine(name: str, said: list[str] | None = None) -> Engine:
    return engines.build(Server(engine=name, workers=2), (said if said is not None else []).append)


def task(index: int) -> LayerTask:
    """A layer with one update."""
    draw = np.random.default_rng(index)
    old, trained = (
        Pair(draw.standard_normal((4, 30)).astype(np.float32), draw.standard_normal((20, 4)).astype(np.float32))
        for _ in range(2)
    )
    name = f"layer {index}"
    share = Share(name, 1.0, 1.0, Adapter({name: old}), Adapter({name: trained}))
    return LayerTask(name, 1, old, None, (share,))


def merged_here(each: LayerTask) -> LayerResult:
    return merge_layer(each, tail=1.0)


def dies(each: LayerTask, *, server: int) -> LayerResult:
    """The worker of one layer is killed, as by a kernel that wants its memory; the server is not."""
    if each.name == "layer 2" and os.getpid() != server:
        os.kill(os.getpid(), signal.SIGKILL)
    return merged_here(each)


def raises(each: LayerTask) -> LayerResult:
    """The method refuses one layer."""
    if each.name == "layer 2":
        raise AggregationError("layer 2 cannot be merged")
    return merged_here(each)


def same(found: Iterable[LayerResult], wanted: Iterable[LayerResult]) -> bool:
    return [(r.pair.a.tobytes(), r.pair.b.tobytes(), r.report) for r in found] == [
        (r.pair.a.tobytes(), r.pair.b.tobytes(), r.report) for r in wanted
    ]


@every_other_engine
def test_every_engine_gives_the_bytes_of_the_local_one_by_every_method(name: str) -> None:
    spread = engine(name)
    for method in sorted(aggregators.METHODS):
        here, there = aggregators.build(method), aggregators.build(method, spread)
        state = learnt_state(8, shapes=SHAPES)
        with threadpool_limits(1):
            for turn in range(2):
                updates = updates_from(state, here, [2, 8, 5], seed=turn)
                wanted, found = here.combine(state, updates), there.combine(state, updates)
                assert save_state(found.state) == save_state(wanted.state)
                assert found.layers == wanted.layers
                state = replace(wanted.state)


@pytest.mark.parametrize("name", ["processes", pytest.param("ray", marks=needs_ray)])
def test_a_layer_whose_worker_is_killed_is_merged_all_the_same(name: str) -> None:
    said: list[str] = []
    tasks = [task(index) for index in range(5)]
    with threadpool_limits(1):
        assert same(engine(name, said)(partial(dies, server=os.getpid()), tasks), map(merged_here, tasks))
    assert any("layer 'layer 2' is merged by the server itself" in text for text in said)


@every_other_engine
def test_an_error_of_the_method_ends_the_merge(name: str) -> None:
    said: list[str] = []
    with pytest.raises(AggregationError, match="layer 2 cannot be merged"):
        list(engine(name, said)(raises, [task(index) for index in range(5)]))
    assert said == []


def test_tasks_are_taken_as_they_can_be_worked_on() -> None:
    """A round whose layers are read from disk one by one never has more than a few of them in memory."""
    taken: list[int] = []

    def tasks() -> Iterator[LayerTask]:
        for index in range(9):
            taken.append(index)
            yield task(index)

    ahead = []
    for done, _ in enumerate(in_order(merged_here, lambda result: result, merged_here, tasks(), 3, print), 1):
        ahead.append(len(taken) - done)
    assert len(taken) == 9
    assert max(ahead) == 2


@pytest.fixture
def apart() -> ModuleType:
    """Ray, where this process is part of no cluster any more."""
    ray: ModuleType = importlib.import_module("ray")
    ray.shutdown()
    return ray


@needs_ray
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_where_nobody_listens_is_refused_before_ray_knocks_for_minutes(
    scheme: str, apart: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "init", lambda **_: pytest.fail("Ray was asked"))
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", 0))  # and never listens
        address = f"{scheme}127.0.0.1:{mine.getsockname()[1]}"
        with pytest.raises(
            EngineError, match=rf"expected at {address} \(.*refused\); start it with `ray start --head`"
        ):
            engines.build(Server(engine="ray", ray_address=address), print)


@needs_ray
@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("address", ["head", "head:99999", "ray://head", "ray://:10001"])
def test_an_address_of_a_cluster_that_is_none_is_refused_with_the_forms_there_are(address: str) -> None:
    with pytest.raises(EngineError, match=rf"expected at {address} .*(HOST:PORT|range 0-65535)"):
        engines.build(Server(engine="ray", ray_address=address), print)


@needs_ray
@pytest.mark.usefixtures("apart")
def test_no_cluster_of_this_machine_is_one_that_auto_could_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(EngineError, match=r"expected at auto .*start it with `ray start --head`"):
        engines.build(Server(engine="ray", ray_address="auto"), print)


def test_without_any_worker_the_server_merges_by_itself() -> None:
    def nobody(_task: LayerTask) -> LayerResult:
        raise EngineError("no worker is left")

    said: list[str] = []
    tasks = [task(index) for index in range(3)]
    found = in_order(nobody, lambda result: result, merged_here, tasks, 2, said.append)
    assert same(found, map(merged_here, tasks))
    assert len(said) == 3


def test_an_engine_is_known_or_the_known_ones_are_listed() -> None:
    with pytest.raises(ConfigError, match="unknown engine 'spark'; expected one of: local, processes, ray, threads"):
        engine("spark")


def test_a_cluster_is_for_ray() -> None:
    with pytest.raises(ConfigError, match=r'server\.ray_address is for server\.engine = "ray"; found engine "threads"'):
        engines.build(Server(engine="threads", ray_address="head:6379"), print)


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_its_extra_ray_is_missed_in_one_line() -> None:
    with pytest.raises(MissingExtraError, match=r"edge-runtime\[ray\]"):
        engine("ray")
