"""The engine of one process: a task is done when its outcome is asked for."""

from __future__ import annotations

from simulation.engines.spread import Keep, as_it_is
from simulation.work import Bench, Done, Recipe, Task


class Inline:
    """Implements `simulation.engines.spread.Keeping`.

    Args:
        recipe: of the simulation.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._bench = Bench(recipe.workshop())
        self._waiting: dict[str, Task] = {}
        self._keep: Keep = as_it_is

    def keep_by(self, keep: Keep) -> None:
        """Outcomes go through it."""
        self._keep = keep

    def submit(self, task: Task) -> None:
        """Keep it."""
        self._waiting[task.key] = task

    def result(self, key: str) -> Done:
        """Do it now."""
        return self._keep(key, self._bench.do(self._waiting.pop(key)))

    def forget(self, key: str) -> None:
        """It is not wanted any more."""
        self._waiting.pop(key, None)

    def close(self) -> None:
        """Nothing to end."""


def inline(recipe: Recipe) -> Inline:
    """The engine of this process."""
    return Inline(recipe)
