"""MLX: a folder that mlx-lm loads beside a base model, on a Mac and wherever else MLX runs.

mlx-lm gives every layer that it adapts the same rank, and adapts the same layers in the last blocks of the model. So a
pair of a smaller rank is padded with zeros, and a layer that the adapter lacks has none in the file, where mlx-lm's own
zeros stay: both are exact. Factors stand transposed, a as (d_in, r) and b as (r, d_out), the scale beside them.

Source of the format: `mlx_lm.tuner.utils.load_adapters` and `mlx_lm.tuner.lora.LoRALinear`, version 0.32.2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.errors import ExportError, missing_extra, unknown_name
from edge_runtime.lora.adapter import Matrix, Pair
from edge_runtime.lora.files import write_folder
from export.checks import base_of, only_pairs
from export.subject import Logits, Subject
from profiles.packaged import hub_name

try:
    import numpy as np

    from edge_runtime.train.source import read_config
    from export.opened import open_prepared
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "torch", "client") from missing

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""Models whose layers have the same names in mlx-lm as in transformers."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def refuse(subject: Subject) -> None:
    """Find out whether mlx-lm can hold the adapter.

    Raises:
        ExportError: an adapter without a direction, one that is more than pairs, layers outside the blocks of the
            model, another architecture, or no base model; names them.
    """
    config = read_config(base_of(subject).folder)
    only_pairs(subject, "mlx-lm")
    if outside := [name for name in subject.adapter if not _LAYER.fullmatch(name)]:
        raise ExportError(f"mlx-lm adapts layers within blocks; found '{outside[0]}'; export the adapter as peft")
    if config.get("model_type") not in ARCHITECTURES:
        found = str(config.get("model_type"))
        raise ExportError(f"{unknown_name('architecture for mlx', found, ARCHITECTURES)}; export the model as merged")


def write(subject: Subject, folder: Path) -> None:
    """Write the weights, then the configuration.

    Raises:
        ExportError: as `refuse`, or the folder cannot be written.
    """
    refuse(subject)
    blocks = int(read_config(base_of(subject).folder)["num_hidden_layers"])
    filled = {name: pair for name, pair in subject.adapter.items() if pair.rank}
    rank = max(pair.rank for pair in filled.values())
    tensors: dict[str, Matrix] = {}
    for name, pair in filled.items():
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = _transposed(pair, rank, subject.scaling)
    places = [_LAYER.fullmatch(name) for name in filled]
    known = [place for place in places if place is not None]
    config = {
        "fine_tune_type": "lora",
        "lora_parameters": {
            "dropout": 0.0,
            "keys": sorted({place[2] for place in known}),
            "rank": rank,
            "scale": subject.scaling,
        },
        "model": hub_name(subject.base_name),
        "num_layers": blocks - min(int(place[1]) for place in known),
    }
    write_folder(folder, tensors, config, weights=WEIGHTS, about=CONFIG)


def open_engine(subject: Subject, folder: Path) -> MlxEngine:
    """The adapter in mlx-lm, beside the weights that the live model has, in float32.

    Raises:
        ExportError: mlx-lm does not accept the folder.
        MissingExtraError: mlx or mlx-lm is not installed.
    """
    try:
        import mlx.core as mx  # noqa: PLC0415 - of the extra [verify]
        from mlx_lm.models import cache  # noqa: PLC0415 - as above
        from mlx_lm.tuner.utils import load_adapters  # noqa: PLC0415 - as above
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "mlx-lm", "verify") from error
    model = _base(subject)
    try:
        load_adapters(model, str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"expected mlx-lm to load '{folder}'; found: {error}; export it again") from error
    mx.eval(model.parameters())
    model.eval()
    return MlxEngine(model, mx, cache.make_prompt_cache)


@dataclass(eq=False)
class MlxEngine:
    """A model in MLX; see `export.subject.Engine`.

    Attributes:
        model: of mlx-lm.
        mx: the library `mlx.core`.
        make_cache: makes an empty cache of keys and values.
    """

    model: Any
    mx: Any
    make_cache: Any

    def logits(self, tokens: Sequence[int]) -> Logits:
        """(len(tokens), vocabulary)."""
        found = self.model(self.mx.array([list(tokens)]))[0]
        return np.array(found.astype(self.mx.float32))

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The next `count` tokens; one that would end an answer is gone on from like any other."""
        cache, found, row = self.make_cache(self.model), [], list(tokens)
        for _ in range(count):
            row = [int(self.mx.argmax(self.model(self.mx.array([row]), cache=cache)[0, -1]).item())]
            found += row
        return found

    def close(self) -> None:
        """Forget the model."""
        self.model = None


def _transposed(pair: Pair, rank: int, scaling: float) -> tuple[Matrix, Matrix]:
    """(d_in, rank) and (rank, d_out), the scale taken out of the latter."""
    missing = rank - pair.rank
    a = np.pad(pair.a, ((0, missing), (0, 0)))
    b = np.pad(pair.b / np.float32(scaling), ((0, 0), (0, missing)))
    return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)


def _base(subject: Subject) -> Any:
    """The base model in mlx-lm, in float32."""
    import mlx.core as mx  # noqa: PLC0415 - of the extra [verify]
    from mlx_lm.models import llama, qwen2, qwen3  # noqa: PLC0415 - as above

    written = {"llama": llama, "mistral": llama, "qwen2": qwen2, "qwen3": qwen3}
    checkpoint = open_prepared(base_of(subject))
    config = dict(checkpoint.config)
    library = written[config["model_type"]]
    model = library.Model(library.ModelArgs.from_dict(config))
    weights = {name: mx.array(checkpoint.read(name).float().numpy()) for name in checkpoint.names}
    model.load_weights(list(model.sanitize(weights).items()))
    return model
