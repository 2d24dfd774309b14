"""ONNX Runtime as an engine: a graph with a key/value cache, one prompt at a time; it needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ExportError, missing_extra
from export.subject import Logits

Arrays = dict[str, NDArray[Any]]

_PAST, _PRESENT = "past_key_values.", "present."
_ERRORS_ONLY = 3  # of onnxruntime's levels: that initializers which are inputs can't be folded is what we want


@dataclass(eq=False)
class OnnxEngine:
    """A graph open in ONNX Runtime; see `export.subject.Engine`.

    Attributes:
        session: of onnxruntime, of a graph as `onnx_graph.trace` writes it.
        options: of every run, or None; adapters are active in them.
        adapter: what is active in `options`, kept because they do not keep it.
    """

    session: Any
    options: Any = None
    adapter: Any = None

    def logits(self, tokens: Sequence[int]) -> Logits:
        """(len(tokens), vocabulary)."""
        found, _ = self._run(tokens, self._empty_cache(), 0)
        return found

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The next `count` tokens."""
        known, chosen, cache, done = list(tokens), [], self._empty_cache(), 0
        for _ in range(count):
            logits, cache = self._run(known[done:], cache, done)
            done = len(known)
            chosen.append(int(logits[-1].argmax()))
            known.append(chosen[-1])
        return chosen

    def close(self) -> None:
        """Forget session and adapter."""
        self.session = self.options = self.adapter = None

    def _run(self, tokens: Sequence[int], cache: Arrays, done: int) -> tuple[Logits, Arrays]:
        """Logits of tokens after `done` others, and the cache with them in it."""
        whole = done + len(tokens)
        feeds = {
            "input_ids": np.array([list(tokens)], np.int64),
            "attention_mask": np.ones((1, whole), np.int64),
            "position_ids": np.arange(done, whole, dtype=np.int64)[None],
        }
        names = [output.name for output in self.session.get_outputs()]
        wanted = {value.name for value in self.session.get_inputs()}
        given = {name: value for name, value in feeds.items() if name in wanted} | cache
        found: Mapping[str, NDArray[Any]] = dict(zip(names, self.session.run(names, given, self.options), strict=True))
        later = {
            _PAST + name.removeprefix(_PRESENT): value for name, value in found.items() if name.startswith(_PRESENT)
        }
        return np.asarray(found["logits"][0], np.float32), later

    def _empty_cache(self) -> Arrays:
        """Keys and values of no token: (1, heads, 0, width of a head) each."""
        return {
            value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
            for value in self.session.get_inputs()
            if value.name.startswith(_PAST)
        }


def open_graph(path: Path) -> OnnxEngine:
    """A graph file in ONNX Runtime, on the CPU.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ExportError: ONNX Runtime cannot load it, or it has no key/value cache.
    """
    try:
        import onnxruntime  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise missing_extra("onnxruntime", "export") from error
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = _ERRORS_ONLY
    try:
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    except Exception as error:
        # Whatever is wrong, onnxruntime raises a class of its own for it, and they share no other parent.
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"expected ONNX Runtime to load '{path}'; found: {reason}; export it again") from error
    if not any(value.name.startswith(_PAST) for value in session.get_inputs()):
        raise ExportError(f"expected a graph with a key/value cache in '{path}'; found none; export it again")
    return OnnxEngine(session)
