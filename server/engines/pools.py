"""Engines of this machine: threads, and processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.process import BaseProcess

from threadpoolctl import threadpool_limits

from edge_runtime.errors import EngineError
from server.aggregators.layers import Engine, LayerResult, LayerTask, MergeLayer
from server.engines.ahead import AHEAD, Say, in_order


def threads(workers: int | None, say: Say) -> Engine:
    """Layers merged by threads; as many as this process has cores, when None.

    Whoever merges limits BLAS to one thread, and that holds for the whole process (docs/decisions/0004).
    """
    count = workers or cores()

    def engine(merge: MergeLayer, tasks: Iterable[LayerTask], /) -> Iterator[LayerResult]:
        return _by(ThreadPoolExecutor(count, thread_name_prefix="merge"), merge, tasks, count, say)

    return engine


def processes(workers: int | None, say: Say) -> Engine:
    """Layers merged by processes, which live as long as the merge; as many as this process has cores, when None."""
    count = workers or cores()
    # A fork would copy the locks of the MQTT client's thread in whatever state they are.
    spawn = multiprocessing.get_context("spawn")

    def engine(merge: MergeLayer, tasks: Iterable[LayerTask], /) -> Iterator[LayerResult]:
        pool = ProcessPoolExecutor(count, mp_context=spawn, initializer=begin_worker)
        return _by(pool, merge, tasks, count, say)

    return engine


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def begin_worker() -> None:
    """What a process does before its first layer: one BLAS thread, and an end with its server, however that ends."""
    threadpool_limits(1)
    # Ctrl-C reaches the whole group; the server ends its workers in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _by(pool: Executor, merge: MergeLayer, tasks: Iterable[LayerTask], count: int, say: Say) -> Iterator[LayerResult]:
    def submit(task: LayerTask) -> Future[LayerResult]:
        try:
            return pool.submit(merge, task)
        except BrokenExecutor as error:
            raise EngineError(f"no worker is left ({error})") from error

    try:
        yield from in_order(submit, _result, merge, tasks, AHEAD * count, say)
    finally:
        pool.shutdown(cancel_futures=True)


def _result(found: Future[LayerResult]) -> LayerResult:
    try:
        return found.result()
    except (BrokenExecutor, MemoryError) as error:
        raise EngineError(f"a worker ended before its layer was merged ({type(error).__name__}: {error})") from error
