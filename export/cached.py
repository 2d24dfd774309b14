"""Prompts through a graph with a key/value cache, whichever engine runs it: one function from arrays to arrays.

A graph as optimum traces it takes `input_ids`, `attention_mask`, `position_ids` and the `past_key_values.*` of earlier
tokens, and gives `logits` and the `present.*` of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ExportError
from export.subject import Logits

Arrays = dict[str, NDArray[Any]]
Run = Callable[[Arrays], Mapping[str, NDArray[Any]]]
"""Inputs by name, of which an engine takes those that its graph has → outputs by name."""

_PAST, _PRESENT = "past_key_values.", "present."


def empty_cache(inputs: Mapping[str, Sequence[Any]]) -> Arrays:
    """Keys and values of no token, of a graph with inputs of those shapes: (1, heads, 0, width of a head) each.

    Raises:
        ExportError: a graph without a key/value cache.
    """
    found = {
        name: np.zeros((1, int(shape[1]), 0, int(shape[3])), np.float32)
        for name, shape in inputs.items()
        if name.startswith(_PAST)
    }
    if not found:
        raise ExportError(
            f"expected a graph with a key/value cache; found the inputs {sorted(inputs)}; export it again"
        )
    return found


def logits(run: Run, cache: Arrays, tokens: Sequence[int]) -> Logits:
    """The logits after each token of one prompt: (len(tokens), vocabulary)."""
    found, _ = _step(run, tokens, cache, 0)
    return found


def greedy(run: Run, cache: Arrays, tokens: Sequence[int], count: int) -> list[int]:
    """The next `count` tokens of the highest logit."""
    known, done = list(tokens), 0
    for _ in range(count):
        found, cache = _step(run, known[done:], cache, done)
        done = len(known)
        known.append(int(found[-1].argmax()))
    return known[len(tokens) :]


def _step(run: Run, tokens: Sequence[int], cache: Arrays, done: int) -> tuple[Logits, Arrays]:
    """Logits of tokens after `done` others, and the cache with them in it."""
    whole = done + len(tokens)
    found = run(
        {
            "input_ids": np.array([list(tokens)], np.int64),
            "attention_mask": np.ones((1, whole), np.int64),
            "position_ids": np.arange(done, whole, dtype=np.int64)[None],
            **cache,
        }
    )
    later = {_PAST + name.removeprefix(_PRESENT): value for name, value in found.items() if name.startswith(_PRESENT)}
    return np.asarray(found["logits"][0], np.float32), later
