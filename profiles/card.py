"""The sizes of a base model, read from its config.json without torch: what the planner needs to know of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.errors import BaseModelError, UnknownBaseError, unknown_name


@dataclass(frozen=True)
class Family:
    """How a model type departs from Llama in what has parameters.

    Attributes:
        norms_per_layer: RMS norms of width `hidden_size` in each layer.
        head_norms: whether queries and keys have a norm of width `head_dim` each.
        qkv_bias: key of config.json that says whether q, k and v have a bias, or the fixed answer.
        mlp_bias: whether config.json's `mlp_bias` is honoured.
        tied: whether embedding and head are one matrix when config.json does not say.
    """

    norms_per_layer: int = 2
    head_norms: bool = False
    qkv_bias: str | bool = "attention_bias"
    mlp_bias: bool = False
    tied: bool = False


# Families whose fields agree with Llama's; each is checked against transformers by a test.
FAMILIES: Mapping[str, Family] = {
    "llama": Family(mlp_bias=True),
    "mistral": Family(qkv_bias=False),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(head_norms=True),
    "smollm3": Family(mlp_bias=True, tied=True),
    "gemma": Family(tied=True),
    "gemma2": Family(norms_per_layer=4, tied=True),
}

# Module suffix → the block of the layer that it lives in.
BLOCKS: Mapping[str, str] = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}

_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class ModelCard:
    """The sizes of one base model.

    Attributes:
        name: folder or model name, for messages.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: width of a head.
        vocab_size: tokens that it knows.
        tied: whether embedding and head are one matrix.
        projections: module suffix → (d_out, d_in) of its weight, the same in every layer.
        vector_parameters: norms and biases of the whole model.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    projections: Mapping[str, tuple[int, int]]
    vector_parameters: int

    @property
    def layer_linear_parameters(self) -> int:
        """Weights of the linear modules of one layer: what is held in 4 bits."""
        return sum(d_out * d_in for d_out, d_in in self.projections.values())

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear modules of all layers."""
        return self.num_layers * self.layer_linear_parameters

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding, and of the head where it is a matrix of its own."""
        return self.vocab_size * self.hidden_size * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return self.linear_parameters + self.embedding_parameters + self.vector_parameters

    def rank_parameters(self, target_modules: tuple[str, ...]) -> int:
        """Adapter parameters of one layer per rank: the sum of d_in + d_out over the target modules.

        Raises:
            BaseModelError: a target module that this model does not have.
        """
        return sum(sum(self.shape(module)) for module in target_modules)

    def shape(self, module: str) -> tuple[int, int]:
        """(d_out, d_in) of a module's weight.

        Raises:
            BaseModelError: a module that this model does not have.
        """
        if module not in self.projections:
            raise BaseModelError(unknown_name("target module", module, self.projections))
        return self.projections[module]

    def layer_name(self, index: int, module: str) -> str:
        """The module's path in the live model, such as `model.layers.3.self_attn.q_proj`.

        Raises:
            BaseModelError: a module or a layer that this model does not have.
        """
        self.shape(module)
        if not 0 <= index < self.num_layers:
            raise BaseModelError(f"{self.name} has the layers 0 to {self.num_layers - 1}; found layer {index}")
        return f"model.layers.{index}.{BLOCKS[module]}.{module}"


def card_from_config(config: Mapping[str, Any] | Path, name: str = "") -> ModelCard:
    """The card of a base model.

    Args:
        config: the folder that holds config.json, or what that file says.
        name: how messages call the model; by default the folder's name.

    Raises:
        UnknownBaseError: the folder has no config.json.
        BaseModelError: a field is missing or no positive number, or the model type is not supported (lists what is).
    """
    if isinstance(config, Path):
        return card_from_config(_read(config), name or config.name)
    name = name or str(config.get("_name_or_path") or config.get("model_type") or "model")
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise BaseModelError(f"{name}: {unknown_name('model_type', model_type, FAMILIES)}")
    family = FAMILIES[model_type]
    hidden, intermediate, layers, heads, vocabulary = (_positive(config, key, name) for key in _NEEDED)
    kv_heads = _positive({"num_key_value_heads": heads, **_present(config)}, "num_key_value_heads", name)
    head_dim = _positive({"head_dim": hidden // heads, **_present(config)}, "head_dim", name)
    projections = {
        "q_proj": (heads * head_dim, hidden),
        "k_proj": (kv_heads * head_dim, hidden),
        "v_proj": (kv_heads * head_dim, hidden),
        "o_proj": (hidden, heads * head_dim),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    return ModelCard(
        name=name,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocabulary,
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        projections=projections,
        vector_parameters=hidden + layers * _vectors(config, model_type, projections),
    )


def _vectors(config: Mapping[str, Any], model_type: str, projections: Mapping[str, tuple[int, int]]) -> int:
    """Norms and biases of one layer."""
    family = FAMILIES[model_type]
    rows = {module: d_out for module, (d_out, _) in projections.items()}
    hidden = rows["o_proj"]
    total = family.norms_per_layer * hidden
    if family.head_norms:
        total += 2 * int(config.get("head_dim") or hidden // int(config["num_attention_heads"]))
    by_config = isinstance(family.qkv_bias, str)
    biased = bool(config.get(family.qkv_bias, False)) if isinstance(family.qkv_bias, str) else family.qkv_bias
    if biased:
        total += rows["q_proj"] + rows["k_proj"] + rows["v_proj"]
    if biased and by_config:
        total += rows["o_proj"]  # the key rules all four projections of the attention, Qwen2's fixed bias only three
    if family.mlp_bias and config.get("mlp_bias", False):
        total += rows["gate_proj"] + rows["up_proj"] + rows["down_proj"]
    return total


def _read(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UnknownBaseError(f"expected a model folder with a config.json; found none at {path}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"{path} is not JSON ({error}); download the model again") from error
    if not isinstance(data, dict):
        raise BaseModelError(f"{path} should hold one JSON object; found {type(data).__name__}")
    return data


def _present(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that are null, which config.json uses for "the default"."""
    return {key: value for key, value in config.items() if value is not None}


def _positive(config: Mapping[str, Any], key: str, name: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise BaseModelError(f"{name}: config.json needs a positive whole number '{key}'; found {value!r}")
    return value
