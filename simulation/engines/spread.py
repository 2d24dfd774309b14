"""Tasks spread over workers: so many under way at a time, the others in line, and what a dead worker had done anew."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from edge_runtime.errors import EngineError
from simulation.work import Done, Task

Say = Callable[[str], None]
Keep = Callable[[str, Done], Done]
"""Given a task's key and its outcome, the outcome as it waits until it is asked for."""

AHEAD = 2
"""Tasks under way for each worker: one that it does, and one that is there when it is done."""
DEATHS = 3
"""Workers that a task may take with it before it is to blame."""


def as_it_is(_key: str, done: Done) -> Done:
    """Keeps an outcome in memory."""
    return done


class Engine(Protocol):
    """Computes tasks."""

    def submit(self, task: Task) -> None:
        """A task whose outcome will be asked for."""

    def result(self, key: str) -> Done:
        """The outcome of a task that was submitted; once.

        Raises:
            EdgeRuntimeError: the task failed.
            EngineError: workers die of it, or none is left.
        """

    def forget(self, key: str) -> None:
        """Its outcome will not be asked for."""

    def close(self) -> None:
        """End the workers."""


class Keeping(Engine, Protocol):
    """An engine whose outcomes need not wait in memory."""

    def keep_by(self, keep: Keep) -> None:
        """Have them kept so: a round of many devices may be computed long before it is asked for."""


class Lost(Exception):  # noqa: N818  no error of the house: it is caught below, and the task done again
    """A worker died before its task was done."""


class Workers(Protocol):
    """Those that do the work, one kind for each engine. A handle is whatever stands for a task under way."""

    def begin(self, task: Task) -> Any:
        """Have a task done; its handle.

        Raises:
            Lost: there is no worker at the moment; `mend` may help.
        """

    def wait(self, handles: Iterable[Any]) -> Any:
        """One of them that has ended; waits for it."""

    def fetch(self, handle: Any) -> Done:
        """What came of it.

        Raises:
            Lost: its worker died.
            EdgeRuntimeError: the task failed.
        """

    def mend(self) -> bool:
        """After a death, see that there are workers again; whether all that was under way is lost."""

    def close(self) -> None:
        """End them."""


class Spread:
    """Implements `Keeping` by workers.

    Args:
        workers: those.
        count: how many.
        say: told of deaths.
    """

    def __init__(self, workers: Workers, count: int, say: Say) -> None:
        self._workers, self._most, self._say = workers, AHEAD * count, say
        self._line: OrderedDict[str, Task] = OrderedDict()
        self._under_way: dict[str, tuple[Task, Any]] = {}
        self._ended: dict[str, Done | Exception] = {}
        self._deaths: Counter[str] = Counter()
        self._suspects: set[str] = set()
        self._keep: Keep = as_it_is

    def keep_by(self, keep: Keep) -> None:
        """Outcomes go through it as soon as they are there."""
        self._keep = keep

    def submit(self, task: Task) -> None:
        """Get in line, unless it is under way or done: a device that crashed may ask for the same again."""
        if task.key not in self._under_way and task.key not in self._ended:
            self._line[task.key] = task
        self._fill()

    def result(self, key: str) -> Done:
        """Wait for it, and let others end meanwhile."""
        if key in self._line:
            self._line.move_to_end(key, last=False)
        while key not in self._ended:
            self._fill()
            if not self._under_way:
                raise EngineError(f"the task {key[:12]} was never submitted; report this as a bug")
            self._collect(self._workers.wait([handle for _, handle in self._under_way.values()]))
        found = self._ended.pop(key)
        self._deaths.pop(key, None)
        if isinstance(found, Exception):
            raise found
        return found

    def forget(self, key: str) -> None:
        """Out of the line; one that is under way ends, and is dropped."""
        self._line.pop(key, None)
        self._ended.pop(key, None)
        self._suspects.discard(key)

    def close(self) -> None:
        """End the workers."""
        self._workers.close()

    def _fill(self) -> None:
        # Of several that went down together one is to blame: those are done one at a time now, to see which.
        while self._line and len(self._under_way) < (1 if self._suspects else self._most):
            key, task = self._line.popitem(last=False)
            try:
                self._under_way[key] = task, self._workers.begin(task.at_hand())
            except Lost as error:
                self._line[key] = task
                self._line.move_to_end(key, last=False)
                self._died(error, [])

    def _collect(self, handle: Any) -> None:
        key = next(key for key, (_, found) in self._under_way.items() if found is handle)
        task = self._under_way.pop(key)[0]
        try:
            self._ended[key] = self._keep(key, self._workers.fetch(handle))
            self._suspects.discard(key)
        except Lost as error:
            self._died(error, [task])
        except Exception as error:  # noqa: BLE001  raised again for whoever asks for this task
            self._ended[key] = error
            self._suspects.discard(key)

    def _died(self, error: Lost, tasks: list[Task]) -> None:
        if self._workers.mend():
            tasks = [*tasks, *(task for task, _ in self._under_way.values())]
            self._under_way.clear()
        names = ", ".join(sorted(task.name for task in tasks)[:8])
        self._say(f"a worker died ({error}); the rounds of {names or 'nobody'} are computed again")
        if len(tasks) > 1:
            self._suspects.update(task.key for task in tasks)
        else:
            self._deaths.update(task.key for task in tasks)
        if any(self._deaths[task.key] >= DEATHS for task in tasks) or (not tasks and not self._mended()):
            raise EngineError(
                f"{DEATHS} workers died while they computed rounds of {names} ({error}); give them more memory, or "
                "fewer workers at a time"
            )
        for task in reversed(tasks):
            self._line[task.key] = task
            self._line.move_to_end(task.key, last=False)

    def _mended(self) -> bool:
        """Whether beginning may be tried once more."""
        self._deaths["to begin"] += 1
        return self._deaths["to begin"] < DEATHS
