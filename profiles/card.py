"""The sizes of a base model, derived from its config.json without torch: what the planner needs to know of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_runtime.errors import BaseModelError, UnknownBaseError, unknown_name
from profiles.brief import brief
from profiles.strict_json import json_object


@dataclass(frozen=True)
class Family:
    """How a model type departs from Llama in what has parameters.

    Attributes:
        norms: RMS norms of width `hidden_size` in each layer.
        head_norms: whether queries and keys have a norm of width `head_dim` each.
        qkv_bias: key of config.json that says whether q, k and v have a bias, or the fixed answer.
        mlp_bias: whether config.json's `mlp_bias` is honoured.
        tied: whether embedding and head are one matrix when config.json does not say.
        head_dim: width of a head when config.json does not say; None stands for hidden_size / heads.
    """

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    head_norms: bool = False
    qkv_bias: str | bool = "attention_bias"
    mlp_bias: bool = False
    tied: bool = False
    head_dim: int | None = None


# Families whose fields agree with Llama's; each is checked against transformers by a test.
FAMILIES: Mapping[str, Family] = {
    "llama": Family(mlp_bias=True),
    "mistral": Family(qkv_bias=False),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(head_norms=True, head_dim=128),
    "smollm3": Family(mlp_bias=True, tied=True),
    "gemma": Family(tied=True, head_dim=256),
    "gemma2": Family(
        norms=(
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
        tied=True,
        head_dim=256,
    ),
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

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

# Beyond this no model is meant, and sums would lose their sense.
_LARGEST = 2**31 - 1
_LONGEST = "max_position_embeddings"
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
        layer_vectors: name within a layer, such as `self_attn.q_proj.bias`, → width of each of its norms and biases.
        model_type: row of `FAMILIES`.
        max_position_embeddings: longest sequence that it was made for, in tokens; 0: its configuration does not say.
        stored: type, such as bf16, nf4 or q4_k, → bytes on disk, the largest first; empty: only the sizes are known.
        origin: what was read to know all this, for people.
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
    layer_vectors: Mapping[str, int]
    model_type: str = ""
    max_position_embeddings: int = 0
    stored: Mapping[str, int] = field(default_factory=dict)
    origin: str = ""

    @property
    def stored_bytes(self) -> int:
        """Bytes that the weights take on disk; 0: not known."""
        return sum(self.stored.values())

    @property
    def stored_dtype(self) -> str:
        """The type that most bytes on disk have; empty: not known."""
        return max(self.stored, key=lambda dtype: self.stored[dtype], default="")

    @property
    def vector_parameters(self) -> int:
        """Norms and biases of the whole model."""
        return self.hidden_size + self.num_layers * sum(self.layer_vectors.values())

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


def tensor_shapes(card: ModelCard) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape, as transformers has them, of every parameter; the head only where it is a matrix of its own.

    Lazy: a configuration may claim any number of layers.
    """
    yield EMBEDDING, (card.vocab_size, card.hidden_size)
    for index in range(card.num_layers):
        for module in card.projections:
            yield f"{card.layer_name(index, module)}.weight", card.shape(module)
        for name, width in card.layer_vectors.items():
            yield f"model.layers.{index}.{name}", (width,)
    yield FINAL_NORM, (card.hidden_size,)
    if not card.tied:
        yield HEAD, (card.vocab_size, card.hidden_size)


def card_from_config(config: Mapping[str, Any] | Path, name: str = "") -> ModelCard:
    """The card of a base model.

    Args:
        config: the folder that holds config.json, or what that file says.
        name: how messages call the model; by default the folder's name.

    Raises:
        UnknownBaseError: the folder has no config.json.
        BaseModelError: a field is missing, no positive number or does not fit the others, or the model type is not
            supported (lists what is).
    """
    if isinstance(config, Path):
        return card_from_config(_read(config / "config.json"), name or config.name)
    name = name or str(config.get("_name_or_path") or config.get("model_type") or "model")
    model_type = " ".join(str(config.get("model_type")).split())[:80]  # whatever it says, the message is one line
    if model_type not in FAMILIES:
        raise BaseModelError(f"{name}: {unknown_name('model_type', model_type, FAMILIES)}")
    family = FAMILIES[model_type]
    hidden, intermediate, layers, heads, vocabulary = (_positive(config, key, name) for key in _NEEDED)
    kv_heads = _positive({"num_key_value_heads": heads, **_present(config)}, "num_key_value_heads", name)
    head_dim = _positive({"head_dim": family.head_dim or hidden // heads, **_present(config)}, "head_dim", name)
    if heads % kv_heads:
        raise BaseModelError(
            f"{name}: expected num_attention_heads as a multiple of num_key_value_heads; found {heads} and {kv_heads}"
        )
    longest = _positive(config, _LONGEST, name) if _LONGEST in _present(config) else 0
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
        tied=bool(_present(config).get("tie_word_embeddings", family.tied)),
        projections=projections,
        layer_vectors=_vectors(config, family, projections, head_dim),
        model_type=model_type,
        max_position_embeddings=longest,
    )


def _vectors(
    config: Mapping[str, Any], family: Family, projections: Mapping[str, tuple[int, int]], head_dim: int
) -> dict[str, int]:
    """Norms and biases of one layer."""
    widths = {f"{norm}.weight": projections["o_proj"][0] for norm in family.norms}
    if family.head_norms:
        widths |= {"self_attn.q_norm.weight": head_dim, "self_attn.k_norm.weight": head_dim}
    biased: tuple[str, ...] = ()
    if family.qkv_bias is True:
        biased = ("q_proj", "k_proj", "v_proj")
    elif isinstance(family.qkv_bias, str) and config.get(family.qkv_bias, False):
        # The key rules all four projections of the attention, Qwen2's fixed bias only three.
        biased = ("q_proj", "k_proj", "v_proj", "o_proj")
    if family.mlp_bias and config.get("mlp_bias", False):
        biased += ("gate_proj", "up_proj", "down_proj")
    return widths | {f"{BLOCKS[module]}.{module}.bias": projections[module][0] for module in biased}


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise UnknownBaseError(f"expected a model folder with a config.json; found none at {path}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BaseModelError(f"expected to read {path}; found: {error.strerror}") from error
    return json_object(content, str(path))


def _present(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that are null, which config.json uses for "the default"."""
    return {key: value for key, value in config.items() if value is not None}


def _positive(config: Mapping[str, Any], key: str, name: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _LARGEST:
        # A hostile value may be of any length; the line is not.
        found = brief(value)
        raise BaseModelError(f"{name}: config.json needs a positive whole number '{key}' below 2^31; found {found}")
    return value
