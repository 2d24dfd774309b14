"""What one process does to a cached folder while the others wait."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(lock: Path, waiting: str, say: Callable[[str], None]) -> Iterator[None]:
    """One process at a time within it; the kernel frees the lock of one that dies.

    Args:
        lock: a file, made where it is missing; its folder exists.
        waiting: said once if another process is within.
        say: told that.
    """
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove(path: Path) -> None:
    """A folder with all that is in it, or a file; nothing where there is neither."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
