"""A heap that returns what training returns: the two calls to glibc that make a predicted peak come true.

Most tensors of a small model share glibc's heap. What a layer keeps for its backward pass lies there between what it
needed for a moment only, and the holes are too small for anything that comes later: a fifth to a half of the heap is
empty and still resident when the peak comes. glibc can give the whole pages in such holes back, and does so when asked.

Source: malloc_trim(3), which also returns pages between live blocks; mallopt(3), M_MMAP_THRESHOLD, whose automatic
adjustment would raise it to 32 MiB, by an amount that depends on what was freed before. What both cost and save is
measured in docs/decisions/0005.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

MAPPED_FROM_BYTES = 8 << 20
"""Blocks of this size or more are mapped one by one, and their pages go back when they are freed."""

LAYERS_BETWEEN = 5
"""Layers from one release to the next where some layers keep their activations: with fewer it costs more time, with
more it saves less."""

LAYERS_BETWEEN_TIGHT = 2
"""The same where all are recomputed, for memory's sake."""

_M_MMAP_THRESHOLD = -3


def steady(threshold: int = MAPPED_FROM_BYTES) -> bool:
    """Map every block of `threshold` bytes or more on its own, in this process, from now on.

    Args:
        threshold: bytes; less of it saves more memory and costs more time.

    Returns:
        Whether the C library took it: glibc does, others have no such setting and keep their own ways.
    """
    mallopt = _function("mallopt")
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, threshold) == 1


def release() -> bool:
    """Give unused pages of the heap back to the system; meant for after each micro-batch.

    Returns:
        Whether there was anything to give back; False where the C library is not glibc.
    """
    trim = _function("malloc_trim")
    return trim is not None and trim(0) == 1


@contextmanager
def releasing(layers: Sequence[Any], between: int = LAYERS_BETWEEN) -> Iterator[None]:
    """Within it, the heap is released again and again while these layers run forward and backward.

    Args:
        layers: torch modules, in the order in which they run; hooks are put on them, and taken off at the end.
        between: layers from one release to the next, at least 1.
    """
    hooks = [layer.register_forward_hook(_release_after) for layer in layers[::-between]]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _release_after(_layer: Any, _arguments: Any, output: Any) -> None:
    release()
    hidden = output[0] if isinstance(output, tuple) else output
    if hidden.requires_grad:
        hidden.register_hook(_release_before)  # runs when the backward pass enters the layer


def _release_before(_gradient: Any) -> None:
    release()


def _function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
