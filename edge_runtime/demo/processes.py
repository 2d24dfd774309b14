"""The processes of the demo: started, watched and ended by this one, each with its own log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.demo.limits import Limit

QUIET = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True, eq=False)
class Child:
    """A process that runs one verb.

    Attributes:
        name: of the device, or "server".
        process: the process.
        log: what it prints.
        limit: its memory limit, if it has one.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    limit: Limit | None = None

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    def last_words(self, lines: int = 3) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    def failure(self) -> str:
        """One sentence on how it failed; empty if it did not."""
        code = self.process.poll()
        if not code:
            return ""
        if code == -signal.SIGKILL:
            return f"'{self.name}' was killed" + (", by its memory limit" if self.limit and self.limit.group else "")
        return f"'{self.name}' ended with {code}: {self.last_words(1)}"


def verb(*arguments: str) -> list[str]:
    """The command line of a verb, with this interpreter."""
    return [sys.executable, "-m", "edge_runtime.cli", *arguments]


def spawn(name: str, arguments: Sequence[str], log: Path, limit: Limit | None = None) -> Child:
    """Start a process under its limit; its output goes to the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            limit.command(arguments) if limit else list(arguments),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **QUIET},
            # Ctrl-C is for the demo, which then asks its processes to end in order.
            start_new_session=True,
        )
    return Child(name, process, log, limit)


def end(children: Iterable[Child], grace: float = 20.0) -> None:
    """Ask all to end; kill what has not after `grace` seconds; release the limits."""
    living = [child for child in children if not child.ended]
    for child in living:
        child.process.terminate()
    deadline = time.monotonic() + grace
    for child in living:
        try:
            child.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()
    for child in children:
        if child.limit:
            child.limit.release()
