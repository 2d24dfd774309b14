"""How an adapter leaves the house: one file, one format.

A format is a row of a literal table; adding one is one module and one row. The module has `refuse`, `write` and
`open_engine`, and is imported when one of them is called: the names and the readers of all formats cost nothing.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from edge_runtime.errors import ConfigError, unknown_name
from export.subject import Engine, Subject


class Format(NamedTuple):
    """One way of leaving."""

    refuse: Callable[[Subject], None]
    """Raises ExportError for what this format cannot hold: names layers or family, and what to choose instead."""
    write: Callable[[Subject, Path], None]
    """Write all its files into an existing empty folder."""
    open_engine: Callable[[Subject, Path], Engine]
    """Open such a folder in the engine that devices run; MissingExtraError where it is not installed."""
    readers: str
    """Who reads it, for people."""
    needs_base: bool
    """Whether the base model must be there to write it."""
    tolerance: float
    """Largest difference of a logit against the live adapter in float32; infinite where agreement alone judges."""
    agreement: float
    """Least share of greedy tokens alike."""
    extra: str
    """The optional dependency that verifies it."""


def _format(
    module: str,
    readers: str,
    *,
    needs_base: bool,
    tolerance: float,
    agreement: float = 1.0,
    extra: str,
    **options: str,
) -> Format:
    """A row; `options` are keywords of the module's `write`."""

    def call(function: str, *arguments: Any, **named: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*arguments, **named)

    write = partial(call, "write", **options)
    return Format(
        partial(call, "refuse"), write, partial(call, "open_engine"), readers, needs_base, tolerance, agreement, extra
    )


# Other engines add in another order: on SmolLM2-135M, whose logits reach 34, that alone makes 1.5e-4 of a logit.
FORMATS: dict[str, Format] = {
    # Another order of the same float32 sums makes up to 1e-4 of logits that reach 34, and more of larger ones.
    "peft": _format(
        "export.peft", "PEFT, transformers, vLLM and whatever else reads adapter_model.safetensors",
        needs_base=False, tolerance=1e-3, extra="client",
    ),
    "native": _format(
        "export.native", "this runtime, for adapters of every family", needs_base=False, tolerance=1e-3, extra="client",
    ),
    # Sixteen bits round every weight that changed: measured on SmolLM2-135M up to 0.47 of a logit, at 1e-4 in 32 bits.
    "merged": _format(
        "export.merged", "transformers, vLLM and whatever else reads a Hugging Face folder",
        needs_base=True, tolerance=1.0, agreement=0.95, extra="client",
    ),
    "onnx": _format(
        "export.onnx", "ONNX Runtime and optimum; nothing of torch",
        needs_base=True, tolerance=1e-3, extra="export",
    ),
    "onnx-int8": _format(
        "export.onnx", "ONNX Runtime, at a quarter of the bytes of linear layers",
        needs_base=True, tolerance=math.inf, agreement=0.9, extra="export", weights="int8",
    ),
    "onnx-int4": _format(
        "export.onnx", "ONNX Runtime, at an eighth of the bytes of linear layers",
        needs_base=True, tolerance=math.inf, agreement=0.7, extra="export", weights="int4",
    ),
    "onnx-adapter": _format(
        "export.onnx_adapter", "ONNX Runtime, which takes many adapters in one session",
        needs_base=True, tolerance=1e-3, extra="export",
    ),
    "openvino": _format(
        "export.openvino", "OpenVINO, on Intel's processors, graphics and NPUs",
        needs_base=True, tolerance=1e-3, extra="openvino",
    ),
    "gguf": _format(
        "export.gguf", "llama.cpp and Ollama, beside the base model in GGUF",
        needs_base=True, tolerance=math.inf, agreement=0.95, extra="verify",
    ),
    "gguf-merged": _format(
        "export.gguf_merged", "llama.cpp, Ollama and whatever is built on them",
        needs_base=True, tolerance=math.inf, agreement=0.95, extra="verify",
    ),
    "mlx": _format(
        "export.mlx", "mlx-lm, beside the base model", needs_base=True, tolerance=1e-3, extra="verify",
    ),
}  # fmt: skip


def get(name: str) -> Format:
    """The format of that name.

    Raises:
        ConfigError: no format of that name; lists those there are.
    """
    if name not in FORMATS:
        raise ConfigError(unknown_name("export format", name, FORMATS))
    return FORMATS[name]
