"""Model cards that several tests plan for."""

from __future__ import annotations

from typing import Any

from profiles.card import ModelCard, card_from_config

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def smollm2_config() -> dict[str, Any]:
    """What matters of the config.json of SmolLM2-135M."""
    return {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    }


def smollm2() -> ModelCard:
    """SmolLM2-135M."""
    return card_from_config(smollm2_config(), "SmolLM2-135M")
