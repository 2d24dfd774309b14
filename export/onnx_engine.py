"""ONNX Runtime as an engine, on the CPU; it needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edge_runtime.errors import ExportError, first_line, missing_extra
from export import cached
from export.subject import Logits

_ERRORS_ONLY = 3  # of onnxruntime's levels: that initializers which are inputs can't be folded is what we want


@dataclass(eq=False)
class OnnxEngine:
    """A graph open in ONNX Runtime; see `export.subject.Engine`.

    Attributes:
        session: of onnxruntime, of a graph as `onnx_graph.trace` writes it.
        cache: of no token, from `cached.empty_cache`.
        options: of every run, or None; adapters are active in them.
        adapter: what is active in `options`, kept because they do not keep it.
    """

    session: Any
    cache: cached.Arrays
    options: Any = None
    adapter: Any = None

    def logits(self, tokens: Sequence[int]) -> Logits:
        """(len(tokens), vocabulary)."""
        return cached.logits(self._run, self.cache, tokens)

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The next `count` tokens."""
        return cached.greedy(self._run, self.cache, tokens, count)

    def close(self) -> None:
        """Forget session and adapter."""
        self.session = self.options = self.adapter = None

    def _run(self, arrays: cached.Arrays) -> Mapping[str, NDArray[Any]]:
        names = [output.name for output in self.session.get_outputs()]
        wanted = {value.name for value in self.session.get_inputs()}
        given = {name: array for name, array in arrays.items() if name in wanted}
        return dict(zip(names, self.session.run(names, given, self.options), strict=True))


def open_graph(path: Path) -> OnnxEngine:
    """A graph file in ONNX Runtime.

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
        reason = first_line(error)
        raise ExportError(f"expected ONNX Runtime to load '{path}'; found: {reason}; export it again") from error
    return OnnxEngine(session, cached.empty_cache({value.name: value.shape for value in session.get_inputs()}))
