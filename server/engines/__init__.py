"""Where a merge works: ONE FILE = ONE KIND OF ENGINE, and this literal table.

Layers are independent (`server.aggregators.layers`), and each is merged by the same function from the same numbers with
one BLAS thread, so every engine gives the same bytes. A layer whose worker fails is merged by the server itself: a
merge is whole, or an error of the method ends it and nothing of it is kept.

    local       one layer after the other
    threads     several at a time; numpy leaves the interpreter free while it factorises
    processes   several at a time; a worker that is killed for its memory takes nothing else with it
    ray         wherever the cluster has room: `server.ray_address`, or a cluster of this machine alone
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edge_runtime.config import Server
from edge_runtime.errors import ConfigError, missing_extra, unknown_name
from server.aggregators.layers import Engine, local
from server.engines import pools
from server.engines.ahead import Say


def _local(_settings: Server, _say: Say) -> Engine:
    return local


def _threads(settings: Server, say: Say) -> Engine:
    return pools.threads(settings.workers, say)


def _processes(settings: Server, say: Say) -> Engine:
    return pools.processes(settings.workers, say)


def _ray(settings: Server, say: Say) -> Engine:
    try:
        from server.engines import cluster  # noqa: PLC0415  Ray belongs to an extra
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "ray", "ray") from error
    return cluster.engine(settings.ray_address, settings.workers, say)


ENGINES: Mapping[str, Callable[[Server, Say], Engine]] = {
    "local": _local,
    "threads": _threads,
    "processes": _processes,
    "ray": _ray,
}


def build(settings: Server, say: Say) -> Engine:
    """The engine that a server's file names.

    Args:
        settings: the section `[server]`.
        say: told a sentence for people when a worker fails.

    Raises:
        ConfigError: no such engine (lists those there are), or a setting that is another one's.
        MissingExtraError: Ray is not installed.
        EngineError: there is no cluster where the file says.
    """
    if settings.engine not in ENGINES:
        raise ConfigError(unknown_name("engine", settings.engine, ENGINES))
    if settings.ray_address is not None and settings.engine != "ray":
        raise ConfigError(
            f'server.ray_address is for server.engine = "ray"; found engine "{settings.engine}"; change either'
        )
    return ENGINES[settings.engine](settings, say)
