"""Tasks under way, a bounded number of them, and results in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from edge_runtime.errors import EngineError
from server.aggregators.layers import LayerResult, LayerTask, MergeLayer

AHEAD = 2
"""Layers under way, as a multiple of the workers: none of them waits for its next one, and memory stays bounded."""

Say = Callable[[str], None]
Ticket = TypeVar("Ticket")


def in_order(
    submit: Callable[[LayerTask], Ticket],
    result: Callable[[Ticket], LayerResult],
    merge: MergeLayer,
    tasks: Iterable[LayerTask],
    ahead: int,
    say: Say,
) -> Iterator[LayerResult]:
    """Results in the order of the tasks; what a worker fails at is merged here.

    Args:
        submit: begins a task elsewhere; raises EngineError where nobody is left to take it.
        result: waits for it; raises EngineError where the worker failed, and what `merge` raised where that did.
        merge: the work.
        tasks: taken one by one.
        ahead: of them, at most so many are under way.
        say: told of every layer that is merged here.
    """
    under_way: deque[tuple[LayerTask, Ticket | EngineError]] = deque()

    def begin(task: LayerTask) -> Ticket | EngineError:
        try:
            return submit(task)
        except EngineError as error:
            return error

    def finish() -> LayerResult:
        task, ticket = under_way.popleft()
        try:
            if isinstance(ticket, EngineError):
                raise ticket
            return result(ticket)
        except EngineError as error:
            say(f"{error}; layer '{task.name}' is merged by the server itself")
            return merge(task)

    for task in tasks:
        under_way.append((task, begin(task)))
        if len(under_way) >= ahead:
            yield finish()
    while under_way:
        yield finish()
