"""The product as its users run it: processes of `python -m edge_runtime.cli VERB`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PATIENCE = 240.0
"""Seconds for what takes a few: on a busy machine the imports alone may take half a minute."""

QUIET = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    # No test asks the network for anything.
    "HF_HUB_OFFLINE": "1",
}


def until(met: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
    """Wait for something to happen."""
    deadline = time.monotonic() + patience
    while not met():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {patience:.0f} s")
        time.sleep(0.02)


@contextmanager
def one_core(number: int | None = 0) -> Iterator[None]:
    """Within it this thread, and the processes that it starts, have one processor core.

    The probe measures how fast this machine multiplies. With one thread that is the same on a busy machine as on an
    idle one; with several, each waits for the others, and verdicts and plans would be left to chance.
    """
    if number is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@dataclass(frozen=True, eq=False)
class Running:
    """One process of the product.

    Attributes:
        process: the process.
        out: what it writes to standard output.
        err: what it writes to standard error.
    """

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    @property
    def said(self) -> str:
        """Its standard error so far."""
        return self.err.read_text(encoding="utf-8")

    @property
    def failure(self) -> list[str]:
        """The lines of standard error that say why it ended."""
        return [line for line in self.said.splitlines() if line.startswith("edge-runtime: ")]

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it as a power failure does."""
        self.process.kill()
        self.process.wait()

    def ended(self, patience: float = PATIENCE) -> int:
        """Wait for its end; its exit code."""
        try:
            code = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {patience:.0f} s; it said:\n{self.said[-4000:]}") from None
        assert "Traceback" not in self.said, self.said
        return code


@dataclass
class Launcher:
    """Starts processes of the product, and ends those that are left.

    Attributes:
        folder: where they run, and where their output goes.
        environment: variables beside those of this process.
        started: all of them, in order.
    """

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    started: list[Running] = field(default_factory=list)

    def start(self, *arguments: str, core: int | None = None) -> Running:
        """Start a verb, on any processor core or, where the system can, on the one of that number (modulo all)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{len(self.started):02}-{arguments[0] if arguments else 'nothing'}"
        out, err = self.folder / f"{name}.out", self.folder / f"{name}.err"
        with out.open("wb") as stdout, err.open("wb") as stderr, one_core(core):
            process = subprocess.Popen(
                [sys.executable, "-m", "edge_runtime.cli", *arguments],
                cwd=self.folder,
                env={**os.environ, **QUIET, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )
        self.started.append(Running(process, out, err))
        return self.started[-1]

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Run a verb to its end: exit code, standard output, standard error."""
        running = self.start(*arguments)
        code = running.ended()
        return code, running.out.read_text(encoding="utf-8"), running.said

    def end(self) -> None:
        """Kill whatever still runs."""
        for running in self.started:
            if running.process.poll() is None:
                running.kill()
