"""A plain Hugging Face folder of the base model with the adapter in its weights, in 16 bits; no reader needs PEFT.

Base and adapter are summed in float32 and rounded once. That rounding is the whole difference from the live model: a
weight keeps 8 significant bits as bf16 and 11 as fp16, which has no room beyond 65504. Measured on SmolLM2-135M with an
adapter of rank 8 in every linear layer, which moves logits of up to 34 by up to 3.9: they differ by at most 0.19 as
bf16, 0.031 as fp16 and 6e-5 as fp32, and the most likely token is the same everywhere.

Readers compute in the type in which the weights are stored; the engine here computes in float32, so that what is
compared is the rounding of the weights and not that of the arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_runtime.errors import ExportError, first_line, missing_extra
from export.subject import Subject

try:
    import torch
    import transformers

    from edge_runtime.train.convert import write_checkpoint
    from edge_runtime.train.quiet import quiet
    from export import merging
    from export.torch_engine import TorchEngine
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "torch", "client") from missing

GENERATION = "generation_config.json"
_OF_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id")


def refuse(subject: Subject) -> None:
    """Find out whether the adapter can be merged; see `merging.refuse` for the errors."""
    merging.refuse(subject)


def write(subject: Subject, folder: Path, *, weights: str = "") -> None:
    """Write safetensors, configuration, tokenizer and generation settings.

    Args:
        subject: an adapter of a family that changes weights, and its base model.
        folder: exists and is empty.
        weights: "bf16", "fp16", or "fp32", which rounds nothing and is twice as large; when absent fp16 for a base
            model in fp16, and bf16 for any other: arithmetic in fp16 overflows in some models whose weights it holds.

    Raises:
        ExportError: the adapter cannot be merged, or the folder cannot be written.
        BaseModelError: the base model's weights cannot be found or read, or are too large for fp16.
    """
    checkpoint = merging.merged(subject)
    try:
        write_checkpoint(checkpoint, folder, weights or _narrow(checkpoint.config))
        if not (folder / GENERATION).exists():
            known = {key: checkpoint.config[key] for key in _OF_GENERATION if checkpoint.config.get(key) is not None}
            (folder / GENERATION).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ExportError(f"cannot write '{folder}': {error}; choose a folder that can be written") from error


def _narrow(config: Mapping[str, Any]) -> str:
    return "fp16" if "float16" in (config.get("dtype"), config.get("torch_dtype")) else "bf16"


def open_engine(subject: Subject, folder: Path) -> TorchEngine:  # noqa: ARG001 - all formats are opened alike
    """The folder in transformers, its weights widened to float32.

    Raises:
        ExportError: transformers cannot load it.
    """
    try:
        with quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise ExportError(f"expected transformers to load '{folder}'; found: {reason}; export it again") from error
    return TorchEngine(model.eval())
