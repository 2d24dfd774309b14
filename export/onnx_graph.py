"""From a checkpoint to a graph for ONNX Runtime, with a key/value cache; and what may be done to it afterwards.

optimum traces the model, under names that keep the module's path: the product of the layer `model.layers.0.mlp.up_proj`
is the node `/model/layers.0/mlp/up_proj/MatMul`. Tensors beyond 2 GB, which is what protobuf can hold, go to a file
beside the graph.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edge_runtime.errors import ConfigError, ExportError, MissingExtraError, first_line, missing_extra, unknown_name

try:
    from edge_runtime.train.checkpoint import Checkpoint
    from edge_runtime.train.convert import write_checkpoint
    from edge_runtime.train.quiet import quiet
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "torch", "client") from missing

GRAPH = "model.onnx"
TENSORS = "model.onnx_data"
TASK = "text-generation-with-past"
BITS = {"fp32": 32, "int8": 8, "int4": 4}
"""Types that the weights of linear layers can be kept in → bits of one."""
BLOCK = 32
"""Quantised weights that share one scale, along the inputs of a layer."""
INT8_ACTIVATIONS = 4
"""ONNX Runtime's `accuracy_level`: activations are rounded to 8 bits for the product, which is what makes it fast."""
SENSITIVE = re.compile(r"/(v_proj|down_proj)/MatMul$")
"""Layers whose rounding costs most, as llama.cpp's mixtures have them: what is attended to, and what a block adds."""
_TRANSFORMERS = (4, 58)
_LARGEST = (1 << 31) - (1 << 20)  # bytes of a protobuf message, with room for what is no tensor


def check_weights(weights: str) -> None:
    """Make sure that graphs can be written with such weights.

    Raises:
        ConfigError: no such type; lists those there are.
    """
    if weights not in BITS:
        raise ConfigError(unknown_name("type of weights in an ONNX graph", weights, BITS))


def check_exporter() -> None:
    """Make sure that optimum is there and can trace the models of the transformers at hand.

    Raises:
        MissingExtraError: it is not, or cannot; says how to go on.
    """
    for library in ("optimum-onnx", "onnx", "onnxruntime"):
        try:
            importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError as error:
            raise missing_extra(library, "export") from error
    found = importlib.metadata.version("transformers")
    if tuple(int(part) for part in found.split(".")[:2]) >= _TRANSFORMERS:
        raise MissingExtraError(
            f"optimum-onnx traces models of transformers below 4.58; found {found}; export to ONNX from an environment "
            "of its own: pip install 'edge-runtime[client,export]' 'transformers<4.58' (what was exported runs with "
            "onnxruntime alone), or choose another format"
        )


def trace(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the graph of a checkpoint in float32, with configuration and tokenizer, into a folder.

    Raises:
        MissingExtraError: as `check_exporter`.
        ExportError: a model that optimum cannot trace.
    """
    check_exporter()
    with TemporaryDirectory(dir=folder, prefix=".weights-") as plain, _silent():
        from optimum.exporters.onnx import main_export  # noqa: PLC0415 - an extra, and slow to import

        write_checkpoint(checkpoint, Path(plain), "fp32")
        try:
            main_export(plain, folder, task=TASK, do_validation=False, local_files_only=True)
        except (ValueError, RuntimeError, KeyError) as error:
            reason = first_line(error)
            raise ExportError(
                f"expected a model that optimum can trace; found: {reason}; export it as merged or peft"
            ) from error


def read(path: Path) -> Any:
    """The graph with all its tensors, as a ModelProto of onnx."""
    import onnx  # noqa: PLC0415 - an extra

    return onnx.load(path)


def save(model: Any, folder: Path) -> None:
    """Write a graph in the place of the one in a folder; large tensors beside it where the whole is too large."""
    import onnx  # noqa: PLC0415 - an extra

    (folder / TENSORS).unlink(missing_ok=True)
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > _LARGEST
    onnx.save_model(model, folder / GRAPH, save_as_external_data=large, location=TENSORS)


def quantise(model: Any, weights: str, *, kept: Sequence[str] = ()) -> Any:
    """The graph with the weights of its linear layers in 8 or 4 bits; what is no linear layer stays as it is.

    Of 4 bits, the layers of `SENSITIVE` keep 8: they cost a tenth more and halve the error, or better. Measured on
    SmolLM2-135M merged with a random adapter, mean difference of a logit and share of most likely tokens alike: int8
    0.22, 1.0; int4 1.4, 0.96 (all layers in 4 bits: 3.9, 0.5).

    Source: ONNX Runtime's MatMulNBits, blocks of weights with a scale each, and in 4 bits a zero point.

    Args:
        model: from `read`; it is changed.
        weights: a key of `BITS`.
        kept: names of nodes that stay as they are.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer  # noqa: PLC0415 - an extra

    sensitive = [node.name for node in model.graph.node if SENSITIVE.search(node.name)]
    passes = ((4, [*kept, *sensitive]), (8, kept)) if BITS[weights] == 4 else ((8, kept),)
    with _silent():
        for bits, excluded in passes:
            quantiser = MatMulNBitsQuantizer(
                model,
                bits=bits,
                block_size=BLOCK,
                is_symmetric=bits == 8,
                accuracy_level=INT8_ACTIVATIONS,
                nodes_to_exclude=list(excluded),
            )
            quantiser.process()
            model = quantiser.model.model
    return model


@contextmanager
def _silent() -> Iterator[None]:
    """Without the advice of libraries; tracing warns of every branch that the model's code takes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with quiet():
            yield
    finally:
        logging.disable(before)
