"""A graph for ONNX Runtime of the base model with the adapter in its weights, with a key/value cache.

Merged in float32 and traced by optimum. The weights of linear layers can be kept in 8 or 4 bits, blocks of 32 with a
scale and a zero point; embeddings, norms and a head that is the embedding stay in float32.
"""

from __future__ import annotations

from pathlib import Path

from export import onnx_graph
from export.onnx_engine import OnnxEngine, open_graph
from export.subject import Subject


def refuse(subject: Subject) -> None:
    """Find out whether the adapter can be merged and the model traced.

    Raises:
        MissingExtraError: optimum-onnx is not installed, or does not go with the transformers that is.
        ExportError, BaseModelError: as of `export.merging.refuse`.
    """
    from export import merging  # noqa: PLC0415 - the engine needs no torch

    merging.refuse(subject)
    onnx_graph.check_exporter()


def write(subject: Subject, folder: Path, *, weights: str = "fp32") -> None:
    """Write `model.onnx`, configuration, tokenizer and generation settings.

    Args:
        subject: an adapter of a family that changes weights, and its base model.
        folder: exists and is empty.
        weights: of linear layers, a key of `onnx_graph.BITS`.

    Raises:
        ConfigError: no such type of weights.
        MissingExtraError, ExportError, BaseModelError: as `refuse`; or a model that optimum cannot trace.
    """
    from export import merging  # noqa: PLC0415 - as above

    onnx_graph.check_weights(weights)
    onnx_graph.trace(merging.merged(subject), folder)
    if weights != "fp32":
        graph = onnx_graph.read(folder / onnx_graph.GRAPH)
        onnx_graph.save(onnx_graph.quantise(graph, weights), folder)


def open_engine(subject: Subject, folder: Path) -> OnnxEngine:  # noqa: ARG001 - all formats are opened alike
    """The graph in ONNX Runtime; errors as of `onnx_engine.open_graph`."""
    return open_graph(folder / onnx_graph.GRAPH)
