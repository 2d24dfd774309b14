"""One graph for ONNX Runtime and many adapters: `model.onnx` of the base model, and adapters as `.onnx_adapter` files.

Beside the product of each layer stands that of an adapter, y = x W + (x A) B. A (d_in, r) and B (r, d_out) are inputs
of the graph, of any rank r, and begin with r = 0: without an adapter the graph is the base model. A file brings them
for as many runs as it is active in, so that adapters of unequal ranks are swapped without loading the base again.
The scale is folded into B. The graph's and the files' `model_version` is the beginning of the base's fingerprint.

Source of the format: onnxruntime's `AdapterFormat` and `LoraAdapter`. It takes a file's tensors in the place of
initializers of the same name that are inputs as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.errors import ExportError, first_line, missing_extra
from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.dense import is_dense
from export import onnx_graph
from export.onnx_engine import OnnxEngine, open_graph
from export.subject import Subject

ADAPTER = "adapter.onnx_adapter"
FORMAT = 1
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def refuse(subject: Subject) -> None:
    """Find out whether the adapter is of pairs alone, and its layers are linear layers of the base if there is one.

    Raises:
        MissingExtraError: optimum-onnx is not installed, or does not go with the transformers that is.
        ExportError: tensors, which no such file can hold, or layers that the base model lacks; names them.
        BaseModelError: the base model's weights cannot be found or read.
    """
    _check_pairs(subject.adapter)
    if subject.prepared is not None:
        _layers(subject)
    onnx_graph.check_exporter()


def write(subject: Subject, folder: Path, *, weights: str = "fp32") -> None:
    """Write the graph of the base model with its configuration and tokenizer, and the adapter.

    The graph takes adapters of every layer that has the name of one of this adapter's, such as all q_proj and v_proj.

    Args:
        subject: an adapter of pairs, and its base model.
        folder: exists and is empty.
        weights: of the base model's linear layers, a key of `onnx_graph.BITS`; adapters are float32.

    Raises:
        ConfigError: no such type of weights.
        MissingExtraError, ExportError, BaseModelError: as `refuse`; or a model that optimum cannot trace.
    """
    from export import merging  # noqa: PLC0415 - the engine needs no torch

    onnx_graph.check_weights(weights)
    _check_pairs(subject.adapter)
    layers = _layers(subject)
    onnx_graph.trace(merging.original(subject), folder)
    graph = onnx_graph.read(folder / onnx_graph.GRAPH)
    added = _take_adapters(graph.graph, layers)
    graph.model_version = _version(subject)
    if weights != "fp32":
        graph = onnx_graph.quantise(graph, weights, kept=added)
    onnx_graph.save(graph, folder)
    write_adapter(subject, folder / ADAPTER)


def write_adapter(subject: Subject, path: Path) -> None:
    """Write one more adapter for a graph that is there already.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ExportError: it has tensors, or no base model is known.
    """
    onnxruntime = _onnxruntime()
    _check_pairs(subject.adapter)
    arrays = {}
    for name, pair in subject.adapter.items():
        if pair.rank:
            arrays[name + _DOWN], arrays[name + _UP] = map(np.ascontiguousarray, (pair.a.T, pair.b.T))
    # These borrow the arrays' memory, and the format borrows theirs: all must live until the file is written.
    borrowed = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    form = onnxruntime.AdapterFormat()
    form.set_adapter_version(FORMAT)
    form.set_model_version(_version(subject))
    form.set_parameters(borrowed)
    form.export_adapter(str(path))


def open_engine(subject: Subject, folder: Path) -> OnnxEngine:  # noqa: ARG001 - all formats are opened alike
    """The graph in ONNX Runtime with the folder's adapter active; errors as of `activate`."""
    engine = open_graph(folder / onnx_graph.GRAPH)
    activate(engine, folder / ADAPTER)
    return engine


def activate(engine: OnnxEngine, path: Path | None) -> None:
    """Put an adapter in the place of the one that is active, or none: the base model alone.

    Raises:
        ExportError: no file that ONNX Runtime can read, of another base model, or of layers that the graph has no
            inputs for.
    """
    if path is None:
        engine.options = engine.adapter = None
        return
    onnxruntime = _onnxruntime()
    try:
        found = onnxruntime.AdapterFormat.read_adapter(str(path))
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(path))
    except Exception as error:
        # onnxruntime's own classes share no other parent.
        reason = first_line(error)
        raise ExportError(
            f"expected an adapter of ONNX Runtime in '{path}'; found: {reason}; export it again"
        ) from error
    expected = engine.session.get_modelmeta().version
    if found.get_model_version() != expected:
        raise ExportError(
            f"'{path}' belongs to base model {found.get_model_version():07x}, the graph to {expected:07x}; export the "
            "adapter for this base model"
        )
    inputs = {value.name for value in engine.session.get_overridable_initializers()}
    if beyond := sorted(set(found.get_parameters()) - inputs):
        raise ExportError(
            f"'{path}' has '{beyond[0].removesuffix(_DOWN)}' and {len(beyond) // 2 - 1} more layers that the graph "
            "takes no adapters of; export the graph with this adapter"
        )
    engine.options, engine.adapter = onnxruntime.RunOptions(), adapter
    engine.options.add_active_adapter(adapter)


def _onnxruntime() -> Any:
    try:
        import onnxruntime  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise missing_extra("onnxruntime", "export") from error
    return onnxruntime


def _check_pairs(adapter: Adapter) -> None:
    if not any(adapter.ranks.values()):
        raise ExportError("expected an adapter with at least one direction, found none; train it first")
    if tensors := [name for name in adapter if is_dense(name)]:
        raise ExportError(
            f"an ONNX adapter holds low-rank pairs alone; found '{tensors[0]}' and {len(tensors) - 1} more tensors; "
            "export it as onnx or merged, where its family changes weights, or as native"
        )


def _version(subject: Subject) -> int:
    if subject.prepared is None:
        raise ExportError("an ONNX adapter names its base model; found none; give it with --base")
    return int(subject.prepared.fingerprint[:7], 16)  # 28 bits of it fit into the format's 32


def _layers(subject: Subject) -> dict[str, tuple[int, int]]:
    """Linear layers that adapters may have, with (d_out, d_in): those named like the layers of this one."""
    from export import merging  # noqa: PLC0415 - the engine needs no torch

    model = merging.model_of(merging.original(subject).config)
    linear = {
        name: (int(module.out_features), int(module.in_features))
        for name, module in model.named_modules()
        if hasattr(module, "in_features")
    }
    for name, shape in subject.adapter.shapes.items():
        if linear.get(name) != shape:
            raise ExportError(
                f"layer '{name}' is {shape} in the adapter and {linear.get(name, 'no linear layer')} in the base "
                "model; export with the fleet's base model"
            )
    leaves = {name.rpartition(".")[2] for name in subject.adapter}
    return {name: shape for name, shape in linear.items() if name.rpartition(".")[2] in leaves}


def _take_adapters(graph: Any, layers: Mapping[str, tuple[int, int]]) -> list[str]:
    """Put the product of an adapter beside that of each layer; the names of the nodes added.

    Raises:
        ExportError: a layer whose product the graph does not have as one node.
    """
    by_node = {_node_name(name): name for name in layers}
    nodes: list[Any] = []
    added: list[str] = []
    for node in graph.node:
        nodes.append(node)
        if node.name in by_node:
            name = by_node.pop(node.name)
            beside = _beside(node, name)
            nodes.extend(beside)
            added.extend(step.name for step in beside)
            _add_inputs(graph, name, *layers[name])
    if by_node:
        raise ExportError(
            f"expected a product for layer '{next(iter(by_node.values()))}' in the graph; found none, and of "
            f"{len(by_node) - 1} more layers; export it as onnx or merged"
        )
    del graph.node[:]
    graph.node.extend(nodes)
    return added


def _beside(node: Any, name: str) -> list[Any]:
    """The nodes of an adapter's product; their sum takes the place of what the layer's own node gave."""
    from onnx import helper  # noqa: PLC0415 - an extra

    end, base = node.output[0], f"{node.output[0]}_of_base"
    node.output[0] = base
    steps = [
        ("MatMul", [node.input[0], name + _DOWN], f"{end}_down"),
        ("MatMul", [f"{end}_down", name + _UP], f"{end}_up"),
        ("Add", [base, f"{end}_up"], end),
    ]
    return [helper.make_node(kind, inputs, [output], name=output) for kind, inputs, output in steps]


def _add_inputs(graph: Any, name: str, d_out: int, d_in: int) -> None:
    """The factors of a layer: inputs of a rank of their own, with rank 0 where nobody gives them."""
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415 - an extra

    rank = f"rank of {name}"
    for tensor, shape, start in (
        (name + _DOWN, (d_in, rank), np.zeros((d_in, 0), np.float32)),
        (name + _UP, (rank, d_out), np.zeros((0, d_out), np.float32)),
    ):
        graph.input.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, shape))
        graph.initializer.append(numpy_helper.from_array(start, tensor))


def _node_name(layer: str) -> str:
    """The product's node, as torch names it after modules; a number stays with the list that it counts."""
    return "/" + re.sub(r"\.(?!\d+(?:\.|$))", "/", layer) + "/MatMul"
