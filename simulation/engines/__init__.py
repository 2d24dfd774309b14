"""Where devices' rounds are computed: ONE FILE = ONE KIND OF ENGINE, and this literal table.

A task is a pure function of its own arguments (`simulation.work`), so all engines give the same bytes. They are told of
a task when its device begins, and asked for its outcome when the device is done in virtual time: what lies between is
what they can do side by side.

    inline      in this process, when the outcome is asked for
    processes   several at a time on this machine
    ray         several at a time on a Ray cluster, or on one of this machine alone
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edge_runtime.errors import missing_extra
from simulation.engines.inline import inline
from simulation.engines.pool import processes
from simulation.engines.spread import Engine, Keeping, Say
from simulation.work import Recipe

__all__ = ["ENGINES", "Engine", "Keeping", "build"]


def _inline(recipe: Recipe, _say: Say) -> Keeping:
    return inline(recipe)


def _processes(recipe: Recipe, say: Say) -> Keeping:
    return processes(recipe, recipe.simulation.workers, say)


def _ray(recipe: Recipe, say: Say) -> Keeping:
    try:
        from simulation.engines import cluster  # noqa: PLC0415  Ray belongs to an extra
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "ray", "simulate") from error
    return cluster.on_ray(recipe, recipe.simulation.ray_address, recipe.simulation.workers, say)


ENGINES: Mapping[str, Callable[[Recipe, Say], Keeping]] = {"inline": _inline, "processes": _processes, "ray": _ray}


def build(recipe: Recipe, say: Say) -> Keeping:
    """The engine that a simulation names.

    Args:
        recipe: what every worker must know.
        say: told a sentence for people when a worker fails.

    Raises:
        MissingExtraError: Ray is not installed.
        EngineError: there is no cluster where the file says.
    """
    return ENGINES[recipe.simulation.engine](recipe, say)
