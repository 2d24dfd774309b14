"""Conversion of a base model to the precision it is used at, one tensor and a few of its rows at a time.

A checkpoint that is quantised while it is loaded needs the memory of the whole model first; one that was quantised
beforehand does not. The 4-bit layout is the one bitsandbytes serialises and transformers loads: `weight` and beside it
`absmax`, `quant_map`, `nested_absmax`, `nested_quant_map` and the packed `quant_state`. The 8-bit layout is that of
`eight_bit`: `weight` and beside it `scale`; transformers alone cannot load it.

Source of NF4 and double quantisation: Dettmers et al., QLoRA, arXiv 2305.14314, sections 3.1 and 3.2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from edge_runtime.errors import BaseModelError, first_line, missing_extra, unknown_name
from edge_runtime.train import eight_bit
from edge_runtime.train.checkpoint import Checkpoint, open_folder, portable_config
from edge_runtime.train.gguf_file import open_gguf
from edge_runtime.train.quiet import quiet
from edge_runtime.train.source import CONFIG, WEIGHTS_INDEX, Kind, Source
from profiles.light_import import light_import

try:
    import torch
    import transformers
    from safetensors.torch import save_file
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "torch", "client") from missing

Tensors = dict[str, torch.Tensor]

BLOCK = 64
"""4-bit weights that share one scale."""
NESTED_BLOCK = 256
"""Scales of 4-bit weights that share one scale of their own."""
SHARD_BYTES = 32 << 20
"""Converted tensors that are held in memory before they are written, in bytes."""
TOKEN_BYTES = 512
"""Memory that a token of the vocabulary takes while the tokenizer of a GGUF file is written, in bytes, measured."""
SKELETON_BYTES = 16 << 20
"""Memory of the model without weights, and of what is imported for it, in bytes, measured."""
_MATRIX = 2


@dataclass(frozen=True)
class Precision:
    """How a base model is kept.

    Attributes:
        plain: precision of what is not quantised: embeddings, norms, biases and the head.
        compute: precisions of the arithmetic that a base kept so is loaded for; a plain base has but its own.
        quantise: makes of the weight of a linear layer what is written; None leaves it plain.
        bytes_per_weight: of a linear layer, scales included.
        working_bytes: what one piece of a tensor takes while it is converted, and the library that converts it.
        describe: the `quantization_config` of such a base, given the linear modules that were left plain.
    """

    plain: torch.dtype
    compute: tuple[str, ...]
    bytes_per_weight: float
    working_bytes: int
    quantise: Callable[[str, Checkpoint], Tensors] | None = None
    describe: Callable[[Sequence[str]], dict[str, Any]] | None = None


def _describe_nf4(left: Sequence[str]) -> dict[str, Any]:
    """The fields of transformers' BitsAndBytesConfig, by hand: its own `to_dict` differs between majors."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(left),
    }


def _describe_int8(left: Sequence[str]) -> dict[str, Any]:
    return {"quant_method": eight_bit.METHOD, "modules_to_not_convert": list(left)}


def _four_bit(name: str, checkpoint: Checkpoint) -> Tensors:
    """A weight as bitsandbytes quantises it, bit for bit, without its temporaries of the whole weight in float32."""
    functional = _bitsandbytes()
    packed, scales = [], []
    for _, rows in checkpoint.pieces(name):
        values, state = functional.quantize_4bit(
            rows.contiguous(), blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
        )
        packed.append(values)
        scales.append(state.absmax)
    absmax = torch.cat(scales)
    offset = absmax.mean()
    nested, of_nested = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    state = functional.QuantState(
        absmax=nested,
        shape=torch.Size(checkpoint.shape(name)),
        code=state.code,
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=state.dtype,
        offset=offset,
        state2=of_nested,
    )
    # Cloned, because layers share the table of NF4's values, and safetensors refuses shared memory.
    beside = {f"{name}.{key}": value.clone() for key, value in state.as_dict(packed=True).items()}
    return {name: torch.cat(packed), **beside}


def _bitsandbytes() -> Any:
    try:
        with quiet():
            # Only here: bitsandbytes is slow to import, and a plain base has no need of it.
            return light_import("bitsandbytes.functional")
    except ImportError as error:
        raise missing_extra("bitsandbytes", "client") from error


def _eight_bit(name: str, checkpoint: Checkpoint) -> Tensors:
    shape = checkpoint.shape(name)
    weight, scale = torch.empty(shape, dtype=torch.int8), torch.empty(shape[0], dtype=torch.bfloat16)
    for at, rows in checkpoint.pieces(name):
        try:
            weight[at], scale[at] = eight_bit.quantise(rows)
        except ValueError as error:
            raise BaseModelError(f"expected finite weights in '{name}'; found: {error}; give another base") from error
    return {name: weight, f"{name.removesuffix('.weight')}.scale": scale}


# Working bytes are measured on CPU, at pieces of `PIECE` weights, and rounded up.
PRECISIONS: dict[str, Precision] = {
    "nf4": Precision(torch.bfloat16, ("bf16", "fp32"), 0.516, 48 << 20, _four_bit, _describe_nf4),
    "int8": Precision(torch.bfloat16, ("bf16", "fp32"), 1.01, 16 << 20, _eight_bit, _describe_int8),
    "bf16": Precision(torch.bfloat16, ("bf16",), 2, 12 << 20),
    "fp16": Precision(torch.float16, ("bf16", "fp32"), 2, 12 << 20),
    "fp32": Precision(torch.float32, ("fp32",), 4, 12 << 20),
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


def convert(source: Source, folder: Path, precision: str, *, memory_bytes: int | None = None) -> None:
    """Write a base model at some precision, with configuration and tokenizer, into an empty folder.

    Args:
        source: what to convert.
        folder: where to write; it exists and is empty.
        precision: a key of `PRECISIONS`.
        memory_bytes: what this process may use, with what it uses already; None for no limit.

    Raises:
        BaseModelError: an unknown precision, weights that are quantised already, tensors that are missing, or too
            little memory.
        MissingExtraError: bitsandbytes is not installed and the precision needs it.
    """
    precision_named(precision)
    checkpoint = READERS[source.kind](source.path)
    if "quantization_config" in checkpoint.config:
        method = checkpoint.config["quantization_config"].get("quant_method", "an unknown method")
        raise BaseModelError(f"expected plain weights in {source.path}; found them quantised by {method}; give others")
    if memory_bytes is not None:
        _check_memory(source, checkpoint, precision, memory_bytes)
    write_checkpoint(checkpoint, folder, precision)


def write_checkpoint(checkpoint: Checkpoint, folder: Path, precision: str) -> None:
    """Write what a checkpoint gives, of plain weights, as `convert` writes a base model.

    Raises:
        BaseModelError: an unknown precision, or tensors that are missing.
        MissingExtraError: bitsandbytes is not installed and the precision needs it.
    """
    kept = precision_named(precision)
    checkpoint.write_companions(folder)
    config = portable_config(checkpoint.config) | {"dtype": str(kept.plain).removeprefix("torch.")}
    _write_json(folder / CONFIG, config)
    layout = _layout(folder, checkpoint)
    if kept.describe is not None:
        _write_json(folder / CONFIG, config | {"quantization_config": kept.describe(layout.left)})
    _write_shards(_converted(checkpoint, layout, kept), folder)


def conversion_bytes(checkpoint: Checkpoint, precision: str, kind: Kind) -> int:
    """Memory that converting a checkpoint takes at its peak, beyond what the process has already; a little too much.

    The largest tensor at its new precision with what waits beside it to be written, the float32 of one piece, and of a
    GGUF file the tokenizer. Measured (and by this, in MiB): SmolLM2-135M from GGUF to nf4 113 (142), int8 93 (110),
    bf16 92 (106), fp32 146 (160); from a folder, with an embedding of 100,000 x 1024: 205 (259), 205 (227), 205 (223),
    400 (419).
    """
    kept = precision_named(precision)
    waiting = largest = 0.0
    for name in checkpoint.names:
        shape = checkpoint.shape(name)
        # Embeddings are no linear layers, and the head is left plain; norms and biases are too small to matter.
        linear = len(shape) == _MATRIX and shape[0] != checkpoint.config.get("vocab_size")
        waiting += math.prod(shape) * (kept.bytes_per_weight if linear else kept.plain.itemsize)
        largest = max(largest, waiting)
        waiting = 0.0 if waiting >= SHARD_BYTES else waiting
    tokenizer = TOKEN_BYTES * int(checkpoint.config.get("vocab_size", 0)) if kind == "gguf" else 0
    return int(largest) + kept.working_bytes + tokenizer + SKELETON_BYTES


def _check_memory(source: Source, checkpoint: Checkpoint, precision: str, memory_bytes: int) -> None:
    needed = psutil.Process().memory_info().rss + conversion_bytes(checkpoint, precision, source.kind)
    if needed > memory_bytes:
        raise BaseModelError(
            f"expected {needed >> 20} MiB of memory to convert {source.label} to {precision}; found "
            f"{memory_bytes >> 20} MiB; run `edge-runtime prepare` on a larger machine, copy the folder that it names "
            f"to this device, and give the copy as --base"
        )


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
    model = skeleton(folder)
    head = model.get_output_embeddings()
    linear, left, head_weight = set(), [], ""
    for name, module in model.named_modules():
        if module is head:
            head_weight = f"{name}.weight"
        # transformers would quantise Conv1D (GPT-2) as well, transposed; not so here.
        if module is head or type(module).__name__ == "Conv1D":
            left.append(name)
        elif isinstance(module, torch.nn.Linear):
            linear.add(f"{name}.weight")
    # A tied head is the embedding: it is not written twice.
    tied = {head_weight} if model.config.tie_word_embeddings else set()
    tensors = tuple(name for name in checkpoint.names if name not in tied)
    lacking = {name for name, _ in model.named_parameters()} - tied - set(tensors)
    if lacking:
        raise BaseModelError(
            f"expected the tensors of a {type(model).__name__}; found none named {', '.join(sorted(lacking)[:3])} "
            f"({len(lacking)} missing); give a checkpoint that transformers {transformers.__version__} can load"
        )
    return _Layout(tensors, frozenset(linear), tuple(left))


def skeleton(folder: Path) -> Any:
    """The model that the folder's config.json describes, without any memory for its weights.

    Raises:
        BaseModelError: no causal language model that transformers knows.
    """
    try:
        with quiet(), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            return transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, OSError, KeyError) as error:
        reason = first_line(error)
        raise BaseModelError(
            f"expected a causal language model that transformers {transformers.__version__} knows; found: {reason}"
        ) from error


def _converted(checkpoint: Checkpoint, layout: _Layout, kept: Precision) -> Iterator[Tensors]:
    """Each tensor of the checkpoint, with what belongs to it."""
    for name in layout.tensors:
        if kept.quantise is not None and name in layout.quantised:
            yield kept.quantise(name, checkpoint)
        else:
            yield {name: _plain(name, checkpoint, kept.plain)}


def _plain(name: str, checkpoint: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
    made: torch.Tensor | None = None
    shape = checkpoint.shape(name)
    for at, rows in checkpoint.pieces(name):
        if made is None:
            made = torch.empty(shape or (1,), dtype=dtype if rows.is_floating_point() else rows.dtype)
        made[at] = rows
    if made is not None and dtype == torch.float16 and not torch.isfinite(made).all():
        raise BaseModelError(f"fp16 holds weights up to 65504; '{name}' has larger ones; keep this base as bf16")
    return torch.empty(shape) if made is None else made.reshape(shape)


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
