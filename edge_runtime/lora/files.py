"""An adapter as a PEFT folder: `adapter_model.safetensors` and `adapter_config.json`.

In the folder the scale stands beside the factors (PEFT's lora_alpha / r); in an Adapter it is folded into `b`. Writing
divides it out, reading multiplies it in. Every layer is written with the same scale, whatever its rank, so that also
readers that know only the global lora_alpha and r compute the right change.

Source of the format: PEFT's `LoraConfig`, `LoraModel` (rank_pattern, alpha_pattern, use_rslora) and save format.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from edge_runtime.errors import ExportError, unknown_name
from edge_runtime.lora.adapter import Adapter, Matrix, Pair

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")
# Settings under which W + s * B @ A is not the whole truth about a layer.
_BEYOND_LORA = ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "layer_replication")
# Initialisations that leave the base model's weight as it is; the others (PiSSA, OLoRA, LoftQ …) subtract from it.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class LoraSettings:
    """What PEFT must know to rebuild the layers of an adapter; the fields are LoraConfig's.

    Attributes:
        r: the largest rank.
        lora_alpha: scale times `r`.
        target_modules: the layers by full module path, sorted.
        rank_pattern: rank of each layer whose rank is not `r`.
        alpha_pattern: scale times rank of the same layers.
    """

    r: int
    lora_alpha: float
    target_modules: list[str]
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)


def lora_settings(ranks: Mapping[str, int], scaling: float) -> LoraSettings:
    """The settings under which PEFT gives each layer its rank, and all of them the scale `scaling`.

    PEFT reads a pattern as a regular expression for the end of a module path and takes the first that matches. Full
    paths, longest first, are therefore unambiguous even where one path ends with another.

    Raises:
        ValueError: no layer, a rank below 1, or a scale that is not a positive number.
    """
    if not ranks or min(ranks.values()) < 1:
        raise ValueError(f"expected at least one layer and ranks of at least 1; found {dict(ranks)}")
    if not (math.isfinite(scaling) and scaling > 0):
        raise ValueError(f"expected a positive scale; found {scaling}")
    largest = max(ranks.values())
    other = _spelled_out(ranks, largest)
    return LoraSettings(
        r=largest,
        lora_alpha=_plain(scaling * largest),
        target_modules=sorted(ranks),
        rank_pattern=other,
        alpha_pattern={name: _plain(scaling * rank) for name, rank in other.items()},
    )


def _spelled_out(ranks: Mapping[str, int], largest: int) -> dict[str, int]:
    """The ranks that differ from the default, and those of layers that a pattern so written would match by its end."""
    unlike = {name for name, rank in ranks.items() if rank != largest}
    matched = {name for name in ranks if not unlike.isdisjoint(_tails(name))}
    return {name: ranks[name] for name in sorted(unlike | matched, key=lambda name: (-len(name), name))}


def write_peft_folder(
    adapter: Adapter, folder: Path, *, base_name: str, scaling: float, magnitudes: Mapping[str, Matrix] | None = None
) -> None:
    """Write the adapter so that PEFT, and whatever reads PEFT's format, loads it.

    Args:
        adapter: layers of rank 0 are left out, since PEFT has no such layer.
        folder: created if absent; other files in it are left alone.
        base_name: hub id or path of the base model, for `base_model_name_or_path`.
        scaling: the scale of every layer, lora_alpha / r; it changes how the change is split, not the change.
        magnitudes: of DoRA, (d_out,) of each layer; None for plain LoRA.

    Raises:
        ExportError: the adapter has no direction at all, or the folder cannot be written.
    """
    filled = {name: pair for name, pair in adapter.items() if pair.rank}
    if not filled:
        raise ExportError("expected an adapter with at least one direction, found none; train it first")
    settings = lora_settings({name: pair.rank for name, pair in filled.items()}, scaling)
    tensors: dict[str, Matrix] = {}
    for name, pair in filled.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(pair.a)
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(pair.b / np.float32(scaling))
    for name, magnitude in (magnitudes or {}).items():
        tensors[f"{_PREFIX}{name}.lora_magnitude_vector.weight"] = np.ascontiguousarray(magnitude)
    write_folder(folder, tensors, {**_config(settings, base_name), "use_dora": bool(magnitudes)})


def write_folder(
    folder: Path,
    tensors: Mapping[str, Matrix],
    config: Mapping[str, object],
    *,
    weights: str = WEIGHTS,
    about: str = CONFIG,
) -> None:
    """Write weights first and the configuration last, each by an atomic rename; an earlier configuration goes before.

    A crash leaves a folder without a configuration, which nothing loads, and never a mix of two adapters.

    Raises:
        ExportError: the folder cannot be written.
    """
    text = json.dumps(config, indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / about).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    replace_file(folder / weights, lambda path: save_file(dict(tensors), path, metadata={"format": "pt"}))
    replace_file(folder / about, lambda path: path.write_text(text, encoding="utf-8"))


def read_peft_folder(folder: Path) -> Adapter:
    """The adapter of a PEFT folder, each layer's scale folded into its `b`.

    Ranks come from the tensors; the scale from lora_alpha, alpha_pattern, rank_pattern and use_rslora as PEFT reads
    them (with rsLoRA it is alpha / sqrt(r)).

    Raises:
        ExportError: files that are missing or malformed, a kind of adapter that is more than LoRA (DoRA, biases,
            whole modules), or factors that do not fit together.
    """
    config = _read_config(folder / CONFIG)
    tensors = _read_weights(folder / WEIGHTS)
    factors: dict[str, dict[str, Matrix]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ExportError(
                f"'{folder}' holds '{key}', which is not a factor of LoRA; export the adapter as plain LoRA"
            )
        factors.setdefault(match["layer"], {})[match["factor"]] = tensor
    return Adapter({name: _pair(name, found, config) for name, found in factors.items()})


def scale_of(config: Mapping[str, object], layer: str, rank: int) -> float:
    """The scale that PEFT gives a layer: alpha / r, or alpha / sqrt(r) with rsLoRA.

    Args:
        config: the content of an `adapter_config.json`.
        layer: module path in the base model.
        rank: the rank that the layer's tensors have.

    Raises:
        ExportError: the configuration names another rank than the tensors have, or no alpha.
    """
    told = _pattern(config, "rank_pattern", layer, config.get("r"))
    alpha = _pattern(config, "alpha_pattern", layer, config.get("lora_alpha"))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise ExportError(f"{CONFIG} gives layer '{layer}' no lora_alpha; expected a number, found {alpha!r}")
    if told != rank:
        raise ExportError(f"layer '{layer}': {CONFIG} says rank {told!r}, the tensors have rank {rank}")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern(config: Mapping[str, object], kind: str, layer: str, otherwise: object) -> object:
    patterns = config.get(kind) or {}
    if not isinstance(patterns, dict):
        raise ExportError(f"{CONFIG}: expected '{kind}' to be a table, found {type(patterns).__name__}")
    try:
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), otherwise)
    except re.error as error:
        raise ExportError(f"{CONFIG}: '{kind}' holds what is no regular expression: {error}") from error


def _pair(layer: str, found: Mapping[str, Matrix], config: Mapping[str, object]) -> Pair:
    if found.keys() != {"A", "B"}:
        raise ExportError(f"layer '{layer}': expected lora_A and lora_B, found only lora_{next(iter(found))}")
    a, b = found["A"], found["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ExportError(f"layer '{layer}': expected A (r, d_in) and B (d_out, r), found {a.shape} and {b.shape}")
    return Pair(a, b * np.float32(scale_of(config, layer, int(a.shape[0]))))


def _read_config(path: Path) -> dict[str, object]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ExportError(f"'{path.parent}' is no PEFT folder: expected {CONFIG} in it, found none") from error
    except (OSError, ValueError) as error:
        raise ExportError(f"cannot read '{path}': {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ExportError(f"'{path}': expected peft_type 'LORA', found {kind!r}")
    beyond = [name for name in _BEYOND_LORA if config.get(name)]
    beyond += ["bias"] if config.get("bias", "none") != "none" else []
    beyond += ["init_lora_weights"] if config.get("init_lora_weights", True) not in _PLAIN_INITS else []
    if beyond:
        raise ExportError(f"'{path}': expected plain LoRA, found settings that go beyond it: {', '.join(beyond)}")
    return config


def _from_bfloat16(raw: bytes) -> Matrix:
    """The float32 numbers whose upper halves these are; numpy has no bfloat16."""
    return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)


_DECODERS: Mapping[str, Callable[[bytes], NDArray[np.generic]]] = {
    "F32": lambda raw: np.frombuffer(raw, "<f4"),
    "F16": lambda raw: np.frombuffer(raw, "<f2"),
    "BF16": _from_bfloat16,
}


def _read_weights(path: Path) -> dict[str, Matrix]:
    tensors: dict[str, Matrix] = {}
    try:
        for name, stored in deserialize(path.read_bytes()):  # type: ignore[no-untyped-call]  # safetensors has no types
            if stored["dtype"] not in _DECODERS:
                raise ExportError(f"'{path}': " + unknown_name("dtype", stored["dtype"], _DECODERS))
            values = _DECODERS[stored["dtype"]](bytes(stored["data"]))
            tensors[name] = values.reshape(stored["shape"]).astype(np.float32)
    except FileNotFoundError as error:
        raise ExportError(f"'{path.parent}' is no PEFT folder: expected {WEIGHTS} in it, found none") from error
    except (OSError, SafetensorError) as error:
        raise ExportError(f"cannot read '{path}': {error}") from error
    return tensors


def _config(settings: LoraSettings, base_name: str) -> dict[str, object]:
    return {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "target_modules": settings.target_modules,
        "rank_pattern": settings.rank_pattern,
        "alpha_pattern": settings.alpha_pattern,
    }


def _tails(name: str) -> list[str]:
    """The ends of a module path, at its dots: `a.b.c` gives `b.c` and `c`."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def _plain(number: float) -> float:
    """The number as an int where it is one: other readers of the format expect lora_alpha to be an int."""
    return int(number) if float(number).is_integer() else number


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside `path`, flush it to disk, then rename it over `path`: readers see the old one or the new one.

    Raises:
        ExportError: the file cannot be written.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        write(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: Exception) -> ExportError:
    return ExportError(f"cannot write '{path}': {error}; choose a folder that can be written and has space")
