"""Memory that ran out, whoever says so: torch, CUDA, the C library, Python. One error of ours for all of them.

Allocators fail in many words and few types: torch's CPU allocator raises a plain RuntimeError, safetensors and mmap an
OSError, oneDNN says that it could not create a primitive or a memory object.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from edge_runtime.errors import DeviceMemoryError, first_line

SIGNS = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "failed to allocate",
    "unable to allocate",
    "bad_alloc",
    "could not create a memory object",
    "could not create a primitive",
)
"""What the messages of failed allocations hold, in lower case."""


def is_exhaustion(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that memory ran out."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(found, OSError) and found.errno == errno.ENOMEM:
            return True
        if isinstance(found, Exception) and any(sign in str(found).lower() for sign in SIGNS):
            return True
        found = found.__cause__
    return False


@contextmanager
def bearing(doing: str) -> Iterator[None]:
    """Within it, memory that runs out is a DeviceMemoryError.

    What the failed work held in its local variables is let go, activations above all: or the error itself would keep
    the memory that the next, smaller plan needs.

    Args:
        doing: what is done within, in words that follow "while".

    Raises:
        DeviceMemoryError: memory ran out.
    """
    try:
        yield
    except DeviceMemoryError:
        raise
    except Exception as error:
        if not is_exhaustion(error):
            raise
        traceback.clear_frames(error.__traceback__)
        said = first_line(error)
        raise DeviceMemoryError(f"memory ran out while {doing} ({said[:300]})") from None
