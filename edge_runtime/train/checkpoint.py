"""A checkpoint on disk, one tensor at a time: converting a model must not need the memory to hold it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.errors import BaseModelError, missing_extra
from edge_runtime.train.source import read_config, weight_files

try:
    import torch
    from safetensors import safe_open
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "torch", "client") from missing

PIECE = 1 << 20
"""Weights that are read at once, at least 64 rows of them: what a conversion holds in float32 beside its result."""
_ROW_MULTIPLE = 64
# Every piece but the last is then a multiple of 64 weights, whatever the width: no block of 4-bit weights is cut.

_TOKENIZER_JSON = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
# Whatever a tokenizer, its chat template and `generate` may read; a model has some of these.
_COMPANIONS = (
    _TOKENIZER_JSON, _TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a base model is made of.

    Attributes:
        config: the content of its config.json.
        names: its tensors, named as transformers names its parameters, in the order of the file.
        shape: of a tensor, by name; nothing is read for it.
        rows: rows [start, stop) of a tensor by name, on the CPU, in memory of their own or mapped, in the precision
            that is stored (float32 if that is a GGUF block type).
        write_companions: writes tokenizer and generation settings into a folder.
    """

    config: dict[str, Any]
    names: tuple[str, ...]
    shape: Callable[[str], tuple[int, ...]]
    rows: Callable[[str, int, int], torch.Tensor]
    write_companions: Callable[[Path], None]

    def pieces(self, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """A tensor as slices of its rows, in order, of about `PIECE` weights each; a scalar counts as one row."""
        shape = self.shape(name) or (1,)
        width = max(1, math.prod(shape[1:]))
        step = max(1, PIECE // width // _ROW_MULTIPLE) * _ROW_MULTIPLE
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            yield slice(start, stop), self.rows(name, start, stop)

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor by name, in memory of its own and in the precision it is stored in."""
        return torch.cat([piece.clone() for _, piece in self.pieces(name)]).reshape(self.shape(name))


def open_folder(folder: Path) -> Checkpoint:
    """A Hugging Face folder with safetensors.

    Raises:
        BaseModelError: no configuration, no weights, or no tokenizer.
    """
    file_of: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a handle of safetensors, which is no dict
                file_of[name], shapes[name] = path, tuple(file.get_slice(name).get_shape())

    def rows(name: str, start: int, stop: int) -> torch.Tensor:
        # Opened anew each time, so that the mapped pages of those before it can go.
        with safe_open(file_of[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_slice(name)[start:stop] if shapes[name] else file.get_tensor(name)[None]
        return tensor

    return Checkpoint(
        read_config(folder), tuple(file_of), shapes.__getitem__, rows, lambda target: _copy_companions(folder, target)
    )


def _copy_companions(folder: Path, target: Path) -> None:
    found = [name for name in _COMPANIONS if (folder / name).is_file()]
    if not any(name in found for name in (_TOKENIZER_JSON, "tokenizer.model", "spiece.model", "vocab.json")):
        raise BaseModelError(f"expected a tokenizer ({_TOKENIZER_JSON}) in {folder}; found none; fetch it again")
    for name in found:
        shutil.copyfile(folder / name, target / name)
    if _TOKENIZER_CONFIG in found:
        config = json.loads((target / _TOKENIZER_CONFIG).read_bytes())
        (target / _TOKENIZER_CONFIG).write_text(json.dumps(portable_tokenizer(config), indent=2), encoding="utf-8")


def portable_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that transformers 4 reads as well as 5: what 5 renamed gets its old name back."""
    renamed = dict(config)
    if renamed.get("tokenizer_class") == "TokenizersBackend":
        renamed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if renamed.get("extra_special_tokens") == []:
        del renamed["extra_special_tokens"]
    return renamed


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json that transformers 4 reads as well as 5.

    5 keeps the base of the rotary embedding in `rope_parameters`, which 4 ignores: it would silently use its default.
    """
    both = dict(config)
    rope = both.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        both.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            both.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    if "torch_dtype" in both:
        both["dtype"] = both.pop("torch_dtype")
    return both
