"""Conversion of a base model to the precision it is used at, one tensor at a time.

A checkpoint that is quantised while it is loaded needs the memory of the whole model first; one that was quantised
beforehand does not. The 4-bit layout is the one bitsandbytes serialises and transformers loads: `weight` and beside it
`absmax`, `quant_map`, `nested_absmax`, `nested_quant_map` and the packed `quant_state`.

Source of NF4 and double quantisation: Dettmers et al., QLoRA, arXiv 2305.14314, sections 3.1 and 3.2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.errors import BaseModelError, missing_extra, unknown_name
from edge_runtime.train.checkpoint import Checkpoint, open_folder, portable_config
from edge_runtime.train.gguf_file import open_gguf
from edge_runtime.train.quiet import quiet
from edge_runtime.train.source import CONFIG, WEIGHTS_INDEX, Kind, Source

try:
    import torch
    import transformers
    from safetensors.torch import save_file
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "torch", "client") from missing

Tensors = dict[str, torch.Tensor]

BLOCK = 64
"""Weights that share one scale."""
SHARD_BYTES = 64 << 20
"""Converted tensors that are held in memory before they are written, in bytes; safetensors copies them once more."""


@dataclass(frozen=True)
class Precision:
    """How a base model is kept.

    Attributes:
        plain: precision of what is not quantised: embeddings, norms, biases and the head.
        four_bit: whether linear layers are quantised to NF4 with double quantisation.
    """

    plain: torch.dtype
    four_bit: bool


PRECISIONS: dict[str, Precision] = {
    "nf4": Precision(torch.bfloat16, four_bit=True),
    "bf16": Precision(torch.bfloat16, four_bit=False),
    "fp32": Precision(torch.float32, four_bit=False),
}

READERS: dict[Kind, Callable[[Path], Checkpoint]] = {"folder": open_folder, "hub": open_folder, "gguf": open_gguf}


def precision_named(name: str) -> Precision:
    """A row of `PRECISIONS`.

    Raises:
        BaseModelError: no such precision; lists them.
    """
    if name not in PRECISIONS:
        raise BaseModelError(unknown_name("precision", name, PRECISIONS))
    return PRECISIONS[name]


def convert(source: Source, folder: Path, precision: str) -> None:
    """Write a base model at some precision, with configuration and tokenizer, into an empty folder.

    Raises:
        BaseModelError: an unknown precision, weights that are quantised already, or tensors that are missing.
        MissingExtraError: bitsandbytes is not installed and the precision needs it.
    """
    kept = precision_named(precision)
    checkpoint = READERS[source.kind](source.path)
    if "quantization_config" in checkpoint.config:
        method = checkpoint.config["quantization_config"].get("quant_method", "an unknown method")
        raise BaseModelError(f"expected plain weights in {source.path}; found them quantised by {method}; give others")
    checkpoint.write_companions(folder)
    config = portable_config(checkpoint.config) | {"dtype": str(kept.plain).removeprefix("torch.")}
    _write_json(folder / CONFIG, config)
    layout = _layout(folder, checkpoint)
    if kept.four_bit:
        _write_json(folder / CONFIG, config | {"quantization_config": _quantization_config(layout)})
    _write_shards(_converted(checkpoint, layout, kept), folder)


@dataclass(frozen=True)
class _Layout:
    """Which tensors there are, and what becomes of them.

    Attributes:
        tensors: names to write, in the order of the checkpoint.
        quantised: those among them that are weights of linear layers.
        left: modules of linear kind that stay as they are.
    """

    tensors: tuple[str, ...]
    quantised: frozenset[str]
    left: tuple[str, ...]


def _layout(folder: Path, checkpoint: Checkpoint) -> _Layout:
    skeleton = _skeleton(folder)
    head = skeleton.get_output_embeddings()
    linear, left, head_weight = set(), [], ""
    for name, module in skeleton.named_modules():
        if module is head:
            head_weight = f"{name}.weight"
        # transformers would quantise Conv1D (GPT-2) as well, transposed; not so here.
        if module is head or type(module).__name__ == "Conv1D":
            left.append(name)
        elif isinstance(module, torch.nn.Linear):
            linear.add(f"{name}.weight")
    # A tied head is the embedding: it is not written twice.
    tied = {head_weight} if skeleton.config.tie_word_embeddings else set()
    tensors = tuple(name for name in checkpoint.names if name not in tied)
    lacking = {name for name, _ in skeleton.named_parameters()} - tied - set(tensors)
    if lacking:
        raise BaseModelError(
            f"expected the tensors of a {type(skeleton).__name__}; found none named {', '.join(sorted(lacking)[:3])} "
            f"({len(lacking)} missing); give a checkpoint that transformers {transformers.__version__} can load"
        )
    return _Layout(tensors, frozenset(linear), tuple(left))


def _skeleton(folder: Path) -> Any:
    """The model without any memory for its weights."""
    try:
        with quiet(), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            return transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BaseModelError(
            f"expected a causal language model that transformers {transformers.__version__} knows; found: {reason}"
        ) from error


def _quantization_config(layout: _Layout) -> dict[str, Any]:
    """The fields of transformers' BitsAndBytesConfig, by hand: its own `to_dict` differs between majors."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(layout.left),
    }


def _converted(checkpoint: Checkpoint, layout: _Layout, kept: Precision) -> Iterator[Tensors]:
    """Each tensor of the checkpoint, with what belongs to it."""
    quantise = _quantiser() if kept.four_bit else None
    for name in layout.tensors:
        tensor = checkpoint.read(name)
        if quantise and name in layout.quantised:
            yield quantise(name, tensor)
        else:
            yield {name: tensor.to(kept.plain).contiguous() if tensor.is_floating_point() else tensor.contiguous()}


def _quantiser() -> Callable[[str, torch.Tensor], Tensors]:
    try:
        with quiet():
            # Only here: bitsandbytes is slow to import, and a plain base has no need of it.
            from bitsandbytes import functional  # noqa: PLC0415
    except ImportError as error:
        raise missing_extra("bitsandbytes", "client") from error

    def quantise(name: str, weight: torch.Tensor) -> Tensors:
        packed, state = functional.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        # Cloned, because layers share the table of NF4's values, and safetensors refuses shared memory.
        beside = {f"{name}.{key}": value.clone() for key, value in state.as_dict(packed=True).items()}
        return {name: packed, **beside}

    return quantise


def _write_shards(groups: Iterator[Tensors], folder: Path) -> None:
    """Write tensors as they come, a file whenever enough have come together; a group is never torn apart."""
    shards: list[Path] = []
    weight_map: dict[str, str] = {}
    waiting: Tensors = {}

    def write() -> None:
        path = folder / f"model-{len(shards) + 1:05d}.safetensors"
        save_file(waiting, path, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(waiting, path.name))
        shards.append(path)
        waiting.clear()

    total = 0
    for group in groups:
        waiting |= group
        total += _bytes(group)
        if _bytes(waiting) >= SHARD_BYTES:
            write()
    if waiting:
        write()
    if len(shards) == 1:
        shards[0].rename(folder / "model.safetensors")
    else:
        _write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
