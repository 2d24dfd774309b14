"""The engine of several processes on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from multiprocessing.context import BaseContext

from server.engines.pools import begin_worker, cores
from simulation.engines.spread import Lost, Say, Spread
from simulation.work import Bench, Done, Recipe, Task

_BENCH: list[Bench] = []
"""Of this process, where it is a worker."""


class Processes:
    """Implements `simulation.engines.spread.Workers` by a pool of processes.

    Args:
        recipe: of the simulation.
        count: of processes.
    """

    def __init__(self, recipe: Recipe, count: int) -> None:
        self._recipe, self._count = recipe, count
        self._pool = self._new()

    def _new(self) -> ProcessPoolExecutor:
        # A fork of this process would copy the locks of its threads in whatever state they are.
        context: BaseContext = get_context("spawn")
        if self._recipe.simulation.trainer == "real":
            context = get_context("forkserver")
            context.set_forkserver_preload(["simulation.engines.forked"])
        return ProcessPoolExecutor(self._count, context, _begin, (self._recipe,))

    def begin(self, task: Task) -> Future[Done]:
        """Hand it to the pool."""
        try:
            return self._pool.submit(_do, task)
        except BrokenExecutor as error:
            raise Lost(str(error)) from error

    def wait(self, handles: Iterable[Future[Done]]) -> Future[Done]:
        """The first that ends."""
        return next(iter(wait(handles, return_when=FIRST_COMPLETED).done))

    def fetch(self, handle: Future[Done]) -> Done:
        """What it gave."""
        try:
            return handle.result()
        except (BrokenExecutor, MemoryError) as error:
            raise Lost(f"{type(error).__name__}: {error}") from error

    def mend(self) -> bool:
        """A new pool: one dead process ends the pool that it was of."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = self._new()
        return True

    def close(self) -> None:
        """End the pool."""
        self._pool.shutdown(cancel_futures=True)


def processes(recipe: Recipe, workers: int | None, say: Say) -> Spread:
    """The engine; as many processes as this one has cores, when None."""
    count = workers or cores()
    return Spread(Processes(recipe, count), count, say)


def _begin(recipe: Recipe) -> None:
    begin_worker()
    _BENCH[:] = [Bench(recipe.workshop())]


def _do(task: Task) -> Done:
    return _BENCH[0].do(task)
