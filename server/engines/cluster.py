"""The engine on a Ray cluster: one task for each layer, its numbers by way of Ray's object store.

Every machine of the cluster has this package in the same version: a task names its function, and carries none. Ray
itself repeats what is lost with a worker or a machine; what it gives up is merged by the server.

Source: Moritz et al., "Ray: A Distributed Framework for Emerging AI Applications", OSDI 2018.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import RayError, RayTaskError
from threadpoolctl import threadpool_limits

from edge_runtime.errors import EngineError
from server.aggregators.layers import Engine, LayerResult, LayerTask, MergeLayer
from server.engines.ahead import AHEAD, Say, in_order

PATIENCE = 5.0
"""Seconds within which a cluster's head must take a connection: Ray itself would knock for minutes."""
WITHOUT_PLACE = ("auto", "local")
"""Addresses that name no place."""


def engine(address: str | None, workers: int | None, say: Say) -> Engine:
    """The engine on the cluster at an address, or on one of this machine that begins with the first merge.

    Args:
        address: of the cluster's head, HOST:PORT or ray://HOST:PORT; None for a cluster of this machine alone.
        workers: processors of a cluster of this machine; half the number of layers under way. All when None.
        say: told of every layer that a worker failed at.

    Raises:
        EngineError: there is no cluster at that address.
    """
    if address is not None:
        connect(address, workers)

    def spread(merge: MergeLayer, tasks: Iterable[LayerTask], /) -> Iterator[LayerResult]:
        try:
            connect(address, workers)
            processors = workers or int(ray.cluster_resources().get("CPU", 1))
        except (EngineError, RayError) as error:
            say(f"{error}; the server merges by itself")
            return map(merge, tasks)
        remote = ray.remote(num_cpus=1)(_merge_alone)

        def submit(task: LayerTask) -> Any:
            try:
                return remote.remote(merge, task)
            except (RayError, ConnectionError) as error:
                raise EngineError(f"Ray takes no task ({type(error).__name__}: {error})") from error

        return in_order(submit, _result, merge, tasks, AHEAD * max(1, processors), say)

    return spread


def connect(address: str | None, workers: int | None, key: str = "server.engine") -> None:
    """Be part of the cluster, unless this process is already.

    Args:
        address: HOST:PORT or ray://HOST:PORT of its head; auto for the one that this machine, or this job, is part of;
            None for one of this machine alone.
        workers: processors of a cluster of this machine; all when None.
        key: of the configuration that asked for Ray.

    Raises:
        EngineError: there is none at that address; at once, or when the head has not answered for half a minute.
    """
    if ray.is_initialized():
        return
    own = {} if address else {"num_cpus": workers, "include_dashboard": False}
    try:
        if address is not None and address not in WITHOUT_PLACE:
            _knock(address)
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **own)
    except (OSError, RuntimeError, ValueError) as error:
        where = f"a Ray cluster was expected at {address}" if address else "a Ray cluster on this machine cannot begin"
        raise EngineError(
            f"{where} ({error}); start it with `ray start --head`, correct the address, or choose another {key}"
        ) from error


def _knock(address: str) -> None:
    """See that somebody listens there.

    Raises:
        OSError: nobody does.
        ValueError: it is no address.
    """
    place = urlsplit(address if "://" in address else f"//{address}")
    if not place.hostname or place.port is None:
        raise ValueError("which is none of HOST:PORT, ray://HOST:PORT and auto")
    socket.create_connection((place.hostname, place.port), timeout=PATIENCE).close()


def _merge_alone(merge: MergeLayer, task: LayerTask) -> LayerResult:
    with threadpool_limits(1):
        return merge(task)


def _result(reference: Any) -> LayerResult:
    try:
        found: LayerResult = ray.get(reference)
    except RayTaskError as error:
        # What the method itself raised, by its own name; memory that ran out there may suffice here.
        if isinstance(error.cause, MemoryError):
            raise EngineError(f"a worker of Ray ran out of memory ({error.cause})") from error
        raise error.cause from error
    except (RayError, ConnectionError) as error:
        raise EngineError(f"Ray gave a layer up ({type(error).__name__}: {error})") from error
    return found
