"""The sizes of well-known base models, so that a plan needs no download and can name a base that would fit.

Source: the config.json of each model on its makers' hub page; a test holds the sums against the published totals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edge_runtime.errors import UnknownBaseError, unknown_name
from profiles.card import ModelCard, card_from_config


@dataclass(frozen=True)
class KnownBase:
    """The facts of one config.json.

    Attributes:
        hub_ids: models of this very size on the hub: the base and what was tuned from it.
        family: model_type.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        layers: decoder layers.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        vocabulary: rows of the embedding.
        tied: whether embedding and head are one matrix.
        positions: longest sequence, in tokens.
    """

    hub_ids: tuple[str, ...]
    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    positions: int


def _row(hub: str, variants: str, family: str, *sizes: int, tied: bool) -> KnownBase:
    """A row; `variants` are endings of the hub id, `sizes` in the order of the fields."""
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary, positions = sizes
    ids = (hub, *(hub + variant for variant in variants.split()))
    return KnownBase(ids, family, hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary, tied, positions)


# name → hub id, endings of its variants, family; hidden, intermediate, layers, heads, kv heads, head, vocabulary,
# length
KNOWN: Mapping[str, KnownBase] = {
    "SmolLM2-135M": _row(
        "HuggingFaceTB/SmolLM2-135M", "-Instruct", "llama", 576, 1536, 30, 9, 3, 64, 49152, 8192, tied=True
    ),
    "SmolLM2-360M": _row(
        "HuggingFaceTB/SmolLM2-360M", "-Instruct", "llama", 960, 2560, 32, 15, 5, 64, 49152, 8192, tied=True
    ),
    "SmolLM2-1.7B": _row(
        "HuggingFaceTB/SmolLM2-1.7B", "-Instruct", "llama", 2048, 8192, 24, 32, 32, 64, 49152, 8192, tied=True
    ),
    "Qwen2.5-0.5B": _row("Qwen/Qwen2.5-0.5B", "-Instruct", "qwen2", 896, 4864, 24, 14, 2, 64, 151936, 32768, tied=True),
    "Qwen2.5-1.5B": _row(
        "Qwen/Qwen2.5-1.5B", "-Instruct", "qwen2", 1536, 8960, 28, 12, 2, 128, 151936, 32768, tied=True
    ),
    "Qwen2.5-3B": _row("Qwen/Qwen2.5-3B", "-Instruct", "qwen2", 2048, 11008, 36, 16, 2, 128, 151936, 32768, tied=True),
    "Qwen2.5-7B": _row("Qwen/Qwen2.5-7B", "-Instruct", "qwen2", 3584, 18944, 28, 28, 4, 128, 152064, 32768, tied=False),
    "Qwen3-0.6B": _row("Qwen/Qwen3-0.6B", "", "qwen3", 1024, 3072, 28, 16, 8, 128, 151936, 40960, tied=True),
    "Qwen3-1.7B": _row("Qwen/Qwen3-1.7B", "", "qwen3", 2048, 6144, 28, 16, 8, 128, 151936, 40960, tied=True),
    "Qwen3-4B": _row("Qwen/Qwen3-4B", "", "qwen3", 2560, 9728, 36, 32, 8, 128, 151936, 40960, tied=True),
    "Qwen3-8B": _row("Qwen/Qwen3-8B", "", "qwen3", 4096, 12288, 36, 32, 8, 128, 151936, 40960, tied=False),
    "Llama-3.2-1B": _row(
        "meta-llama/Llama-3.2-1B", "-Instruct", "llama", 2048, 8192, 16, 32, 8, 64, 128256, 131072, tied=True
    ),
    "Llama-3.2-3B": _row(
        "meta-llama/Llama-3.2-3B", "-Instruct", "llama", 3072, 8192, 28, 24, 8, 128, 128256, 131072, tied=True
    ),
    "Llama-3.1-8B": _row(
        "meta-llama/Llama-3.1-8B", "-Instruct", "llama", 4096, 14336, 32, 32, 8, 128, 128256, 131072, tied=False
    ),
    "Gemma-2-2B": _row("google/gemma-2-2b", "-it", "gemma2", 2304, 9216, 26, 8, 4, 256, 256000, 8192, tied=True),
    "Mistral-7B-v0.3": _row(
        "mistralai/Mistral-7B-v0.3", "", "mistral", 4096, 14336, 32, 32, 8, 128, 32768, 32768, tied=False
    ),
}
# Tuned from a base of the table, under a name that is no ending of its own.
_TUNED: Mapping[str, str] = {"mistralai/Mistral-7B-Instruct-v0.3": "Mistral-7B-v0.3"}


def known_card(name: str) -> ModelCard:
    """The card of a well-known base model.

    Args:
        name: a name in `KNOWN`, a hub id, or its last part; case does not matter.

    Raises:
        UnknownBaseError: none of these; lists the names.
    """
    names = _names()
    if name.lower() not in names:
        raise UnknownBaseError(unknown_name("base model", name, KNOWN))
    return _card(names[name.lower()])


def is_known(name: str) -> bool:
    """Whether `known_card` has it."""
    return name.lower() in _names()


def known_cards() -> tuple[ModelCard, ...]:
    """All of them, the smallest first."""
    return tuple(sorted(map(_card, KNOWN), key=lambda card: (card.parameters, card.name)))


def _names() -> dict[str, str]:
    """Whatever names a base, in lower case → its name in `KNOWN`."""
    ids = {hub_id: name for name, known in KNOWN.items() for hub_id in known.hub_ids} | dict(_TUNED)
    last = {hub_id.partition("/")[2]: name for hub_id, name in ids.items()}
    return {spelling.lower(): name for spelling, name in ({name: name for name in KNOWN} | ids | last).items()}


def _card(name: str) -> ModelCard:
    known = KNOWN[name]
    config: dict[str, Any] = {
        "model_type": known.family,
        "hidden_size": known.hidden,
        "intermediate_size": known.intermediate,
        "num_hidden_layers": known.layers,
        "num_attention_heads": known.heads,
        "num_key_value_heads": known.kv_heads,
        "head_dim": known.head_dim,
        "vocab_size": known.vocabulary,
        "tie_word_embeddings": known.tied,
        "max_position_embeddings": known.positions,
    }
    return replace(card_from_config(config, name), origin="the table of well-known base models")
