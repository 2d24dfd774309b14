"""The engine on a Ray cluster: a task for each device's round, the recipe by way of Ray's object store.

Every machine of the cluster has this package in the same version, and the same numerical libraries: other ones may add
in another order, and give other last bits. What is under way is bounded here, and so is what Ray keeps in memory.

Source: Moritz et al., "Ray: A Distributed Framework for Emerging AI Applications", OSDI 2018.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from server.engines.cluster import connect
from simulation.engines.spread import Lost, Say, Spread
from simulation.work import Bench, Done, Recipe, Task

_BENCHES: dict[str, Bench] = {}
"""Of this process, where it is a worker: recipe → its bench."""


class OnRay:
    """Implements `simulation.engines.spread.Workers` by tasks of Ray.

    Args:
        recipe: of the simulation.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = ray.put(recipe)
        # A death is counted, and said, by whoever spreads the tasks.
        self._remote = ray.remote(num_cpus=1, max_retries=0)(_do)

    def begin(self, task: Task) -> Any:
        """Hand it to the cluster."""
        try:
            return self._remote.remote(self._recipe, task)
        except (RayError, ConnectionError) as error:
            raise Lost(f"{type(error).__name__}: {error}") from error

    def wait(self, handles: Iterable[Any]) -> Any:
        """The first that ends."""
        known = list(handles)
        ready = ray.wait(known, num_returns=1)[0][0]
        # By way of ray:// it is an equal one, and not the same.
        return next(handle for handle in known if handle == ready)

    def fetch(self, handle: Any) -> Done:
        """What it gave."""
        try:
            found: Done = ray.get(handle)
        except RayTaskError as error:
            if isinstance(error.cause, MemoryError):
                raise Lost(f"a worker of Ray ran out of memory ({error.cause})") from error
            raise error.cause from error
        except (RayError, ConnectionError) as error:
            raise Lost(f"{type(error).__name__}: {error}") from error
        return found

    def mend(self) -> bool:
        """Ray starts workers by itself; one that dies takes nothing else with it."""
        return False

    def close(self) -> None:
        """Leave the cluster; one of this machine alone ends."""
        ray.shutdown()


def on_ray(recipe: Recipe, address: str | None, workers: int | None, say: Say) -> Spread:
    """The engine on the cluster at an address, or on one of this machine.

    Args:
        recipe: of the simulation.
        address: of the cluster's head, HOST:PORT or ray://HOST:PORT; auto for the one that this job is part of; None
            for a cluster of this machine alone.
        workers: processors of a cluster of this machine; all when None.
        say: told of dead workers.

    Raises:
        EngineError: there is no cluster at that address.
    """
    connect(address, workers, "simulation.engine")
    count = workers or int(ray.cluster_resources().get("CPU", 1))
    return Spread(OnRay(recipe), count, say)


def _do(recipe: Recipe, task: Task) -> Done:
    key = recipe.simulation.model_dump_json()
    if key not in _BENCHES:
        _BENCHES.clear()
        _BENCHES[key] = Bench(recipe.workshop())
    return _BENCHES[key].do(task)
