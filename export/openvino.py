"""OpenVINO's own files, `openvino_model.xml` and `.bin`: for Intel's processors, graphics and NPUs.

The graph is that of `export.onnx`, adapter in the weights and a key/value cache; OpenVINO reads it, 4-bit weights
included, and writes its own. Importing openvino imports its telemetry where that is installed: not from here.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray

from edge_runtime.errors import ExportError, missing_extra
from export import cached, onnx, onnx_graph
from export.subject import Logits, Subject

MODEL = "openvino_model.xml"
DEVICE = "CPU"


def refuse(subject: Subject) -> None:
    """Find out whether openvino is there, and all that `export.onnx.refuse` finds out."""
    _openvino()
    onnx.refuse(subject)


def write(subject: Subject, folder: Path, *, weights: str = "fp32") -> None:
    """Write the model, configuration, tokenizer and generation settings; arguments and errors as of `onnx.write`.

    Raises:
        MissingExtraError: openvino is not installed either.
    """
    openvino = _openvino()
    with TemporaryDirectory(dir=folder, prefix=".graph-") as traced:
        onnx.write(subject, Path(traced), weights=weights)
        model = openvino.Core().read_model(Path(traced) / onnx_graph.GRAPH)
        openvino.save_model(model, folder / MODEL, compress_to_fp16=False)
        del model  # it maps the graph's file
        for path in Path(traced).iterdir():
            if path.name not in {onnx_graph.GRAPH, onnx_graph.TENSORS}:
                shutil.move(path, folder / path.name)


def open_engine(subject: Subject, folder: Path) -> OpenVinoEngine:  # noqa: ARG001 - all formats are opened alike
    """The model in OpenVINO, on the CPU and in float32.

    Raises:
        MissingExtraError: openvino is not installed.
        ExportError: OpenVINO cannot load it, or it has no key/value cache.
    """
    openvino = _openvino()
    try:
        compiled = openvino.Core().compile_model(folder / MODEL, DEVICE, {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ExportError(f"expected OpenVINO to load '{folder / MODEL}'; found: {reason}; export it again") from error
    shapes = {value.any_name: _shape(value.partial_shape) for value in compiled.inputs}
    return OpenVinoEngine(compiled, compiled.create_infer_request(), cached.empty_cache(shapes))


@dataclass(eq=False)
class OpenVinoEngine:
    """A model open in OpenVINO; see `export.subject.Engine`.

    Attributes:
        compiled: the model, for a device.
        request: what runs it.
        cache: of no token, from `cached.empty_cache`.
    """

    compiled: Any
    request: Any
    cache: cached.Arrays

    def logits(self, tokens: Sequence[int]) -> Logits:
        """(len(tokens), vocabulary)."""
        return cached.logits(self._run, self.cache, tokens)

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The next `count` tokens."""
        return cached.greedy(self._run, self.cache, tokens, count)

    def close(self) -> None:
        """Forget the model."""
        self.compiled = self.request = None

    def _run(self, arrays: cached.Arrays) -> Mapping[str, NDArray[Any]]:
        wanted = {value.any_name for value in self.compiled.inputs}
        found = self.request.infer({name: array for name, array in arrays.items() if name in wanted})
        return {output.any_name: found[output] for output in self.compiled.outputs}


def _shape(partial: Any) -> list[int]:
    """Sizes of an input; 0 for one that any number may take."""
    return [size.get_length() if size.is_static else 0 for size in partial]


def _openvino() -> Any:
    # None in the place of a module makes its import fail, and openvino then uses its stub of it.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise missing_extra("openvino", "openvino") from error
    return openvino
