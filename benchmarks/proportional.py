"""A command and how much memory it takes with all processes that it starts, by what each alone is to blame for.

The proportional set size (PSS, proc_pid_smaps_rollup(5)) counts a page that several processes map once among them: a
library that all of them have, or a store of objects in shared memory, is counted whole, and once.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

EVERY = 0.2
"""Seconds between two looks, which take some milliseconds each."""


@dataclass(frozen=True)
class Watched:
    """What a command did.

    Attributes:
        output: what it printed.
        began: when it began, by the monotonic clock.
        seconds: from its beginning to its end.
        peak: bytes of all its processes, at most.
        processes: that it had at that moment.
    """

    output: str
    began: float
    seconds: float
    peak: int
    processes: int


def watched(command: Sequence[str], environ: Mapping[str, str]) -> Watched:
    """Run a command to its end, and end what it leaves behind.

    Raises:
        SystemExit: it fails; says how.
    """
    began, largest = time.monotonic(), (0, 0)
    family: dict[int, psutil.Process] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as process:
        said = ["", ""]
        readers = [
            threading.Thread(target=_read, args=(said, index, pipe.read))
            for index, pipe in enumerate((process.stdout, process.stderr))
            if pipe is not None
        ]
        for reader in readers:
            reader.start()
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                found = psutil.Process(process.pid)
                family |= {each.pid: each for each in (found, *found.children(recursive=True))}
            # One whose parent has ended is no child any more, but it is still of this family.
            sizes = [size for each in family.values() if each.is_running() and (size := pss(each.pid))]
            largest = max(largest, (sum(sizes), len(sizes)))
            time.sleep(EVERY)
        seconds = time.monotonic() - began
        for each in family.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        for reader in readers:
            reader.join()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)[:200]} ended with {process.returncode}: {said[1].strip()[-3000:]}")
    return Watched(said[0], began, seconds, *largest)


def _read(said: list[str], index: int, read: Callable[[], str]) -> None:
    said[index] = read()


def pss(pid: int) -> int:
    """The proportional set size of a process in bytes; 0 when it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) * 1024


def on_path(folder: Path) -> dict[str, str]:
    """This process's environment, with a folder of packages before all others."""
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
