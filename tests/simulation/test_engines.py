from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import EngineError, MissingExtraError, RoundError
from simulation import engines
from simulation.engines.pool import Processes
from simulation.engines.spread import Lost, Spread
from simulation.work import Done, Recipe, Task
from tests.simulation.fleets import asked, events, run, world


def killed_once(flag: Path, recipe: Recipe, task: Task) -> Done:
    """What a worker of Ray does, but the first one that has pi-1 is killed, as by a kernel that wants its memory."""
    from simulation.engines import cluster  # noqa: PLC0415  Ray belongs to an extra

    if task.name == "pi-1" and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return cluster._do(recipe, task)


class Some:
    """Implements `Task` as far as an engine looks."""

    def __init__(self, name: str) -> None:
        self.name = self.key = name

    def at_hand(self) -> Some:
        return self


def done(name: str) -> Done:
    return Done(name.encode(), b"", None, {}, 1, 0.0, 0.0, 0.0)


class Workers:
    """Implements `simulation.engines.spread.Workers`: dies as it is told."""

    def __init__(self, deaths: Iterable[str] = (), *, together: bool = False) -> None:
        self.deaths, self.together = list(deaths), together
        self.most = 0
        self.begun: list[str] = []
        self.under_way: list[tuple[str, int]] = []

    def begin(self, task: Task) -> tuple[str, int]:
        self.begun.append(task.name)
        handle = (task.name, len(self.begun))
        self.under_way.append(handle)
        self.most = max(self.most, len(self.under_way))
        return handle

    def wait(self, handles: Iterable[Any]) -> Any:
        return list(handles)[-1]

    def fetch(self, handle: tuple[str, int]) -> Done:
        self.under_way.remove(handle)
        if handle[0] in self.deaths:
            self.deaths.remove(handle[0])
            raise Lost("killed")
        if handle[0] == "bad":
            raise RoundError("the loss is nan")
        return done(handle[0])

    def mend(self) -> bool:
        if self.together:
            self.under_way.clear()
        return self.together

    def close(self) -> None:
        pass


def spread(workers: Workers, said: list[str], count: int = 2) -> Spread:
    made = Spread(workers, count, said.append)
    for name in "abcdefgh":
        made.submit(Some(name))  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("together", [False, True])
def test_what_a_dead_worker_had_is_done_again(together: bool) -> None:
    said: list[str] = []
    workers = Workers(["c", "d", "d"], together=together)
    made = spread(workers, said)
    assert [made.result(name).payload for name in "hcabdefg"] == [name.encode() for name in "hcabdefg"]
    assert len(said) == 3
    assert "computed again" in said[0]
    assert workers.most <= 4, "memory is bounded by what is under way"


def test_a_task_that_kills_worker_after_worker_ends_the_run() -> None:
    made = spread(Workers(["c"] * 9), [])
    with pytest.raises(EngineError, match="3 workers died while they computed rounds of c"):
        made.result("c")


def test_an_error_of_a_task_is_that_of_whoever_asks_for_it() -> None:
    made = spread(Workers(), [])
    made.submit(Some("bad"))  # type: ignore[arg-type]
    assert made.result("a").payload == b"a"
    with pytest.raises(RoundError, match="the loss is nan"):
        made.result("bad")


def test_what_is_forgotten_is_not_begun() -> None:
    workers = Workers()
    made = spread(workers, [])
    made.forget("h")
    assert made.result("g").payload == b"g"
    assert "h" not in workers.begun
    with pytest.raises(EngineError, match="never submitted"):
        made.result("h")


@pytest.mark.slow
def test_processes_give_the_same_bytes_even_if_one_is_killed(tmp_path: Path) -> None:
    inline = run(tmp_path / "inline")
    said: list[str] = []
    several = world(tmp_path / "several", "simulation.engine=processes", "simulation.workers=2")
    several._journal._engine._say = said.append  # type: ignore[attr-defined]
    killed: list[int] = []

    def kill(done: int, _of: int) -> None:
        if done == 1 and not killed:
            pool = several._journal._engine._workers._pool  # type: ignore[attr-defined]
            pool.submit(os.getpid).result()
            killed.append(next(iter(pool._processes)))
            os.kill(killed[0], signal.SIGKILL)

    found = several.run(progress=kill)
    assert killed
    assert "computed again" in said[0]
    assert found.adapter == inline.adapter
    assert events(tmp_path / "several") == events(tmp_path / "inline")


@pytest.mark.slow
def test_ray_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    inline = run(tmp_path / "inline")
    found = run(tmp_path / "ray", "simulation.engine=ray", "simulation.workers=2")
    assert found.adapter == inline.adapter
    assert events(tmp_path / "ray") == events(tmp_path / "inline")


@pytest.mark.slow
def test_a_killed_worker_of_ray_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from simulation.engines import cluster  # noqa: PLC0415  Ray belongs to an extra

    inline = run(tmp_path / "inline")
    said: list[str] = []
    flag = tmp_path / "killed"
    monkeypatch.setattr(cluster, "_do", lambda recipe, task: killed_once(flag, recipe, task))
    several = world(tmp_path / "ray", "simulation.engine=ray", "simulation.workers=2")
    several._journal._engine._say = said.append  # type: ignore[attr-defined]
    found = several.run()
    assert flag.exists()
    assert any("the rounds of pi-1 are computed again" in text for text in said)
    assert found.adapter == inline.adapter
    assert events(tmp_path / "ray") == events(tmp_path / "inline")


@pytest.mark.slow
def test_a_ray_job_computes_on_the_cluster_that_it_is_a_job_of(tmp_path: Path) -> None:
    """A job's entry point is a process of its own, to which Ray tells the address of its cluster."""
    ray = pytest.importorskip("ray")
    run(tmp_path / "inline")
    (tmp_path / "fleet.toml").write_text("")
    chosen = asked("simulation.engine=ray", "simulation.ray_address=auto")
    words = [sys.executable, "-m", "edge_runtime.cli", "simulate", "fleet.toml", "--out", "job", "--no-draw", "--json"]
    words += [word for each in chosen for word in ("--set", each)]
    ray.shutdown()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        told = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        done = subprocess.run(words, cwd=tmp_path, env=told, capture_output=True, text=True, check=False)
    finally:
        ray.shutdown()
    assert done.returncode == 0, done.stderr
    assert events(tmp_path / "job") == events(tmp_path / "inline")


def test_what_ray_has_ready_is_the_handle_that_was_given_even_if_it_comes_as_another_object(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = pytest.importorskip("ray")
    from simulation.engines import cluster  # noqa: PLC0415  Ray belongs to an extra

    handles = [frozenset({name}) for name in "ab"]
    monkeypatch.setattr(ray, "wait", lambda known, num_returns: ([frozenset(set(known[num_returns]))], known))
    found = object.__new__(cluster.OnRay).wait(iter(handles))
    assert found is handles[1]


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_of_ray_that_nobody_is_at_ends_the_run_with_what_to_do(tmp_path: Path, scheme: str) -> None:
    pytest.importorskip("ray").shutdown()
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", 0))  # and never listens
        address = f"{scheme}127.0.0.1:{mine.getsockname()[1]}"
        with pytest.raises(EngineError, match=f"cluster was expected at {address} .*another simulation.engine"):
            run(tmp_path, "simulation.engine=ray", f"simulation.ray_address={address}")


def test_without_ray_its_engine_names_the_extra(tmp_path: Path) -> None:
    try:
        import ray  # noqa: F401, PLC0415
    except ModuleNotFoundError:
        with pytest.raises(MissingExtraError, match="simulate"):
            run(tmp_path, "simulation.engine=ray")


def test_the_table_has_every_engine_that_a_file_may_name() -> None:
    assert set(engines.ENGINES) == {"inline", "processes", "ray"}


def test_a_pool_mends(tmp_path: Path) -> None:
    made = world(tmp_path)
    pool = Processes(Recipe(made._simulation), 1)
    first = pool._pool
    assert pool.mend()
    assert pool._pool is not first
    pool.close()
