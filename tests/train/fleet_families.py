"""Slots of every family over the tiny base model, as plans make them, and what each does by hand."""

from __future__ import annotations

import json
from pathlib import Path

from edge_runtime.lora.adapter import LayerSlot, Slot
from profiles import families
from profiles.card import ModelCard, card_from_config

RANK, HELD, ROWS = 3, 5, 6


def card_of(folder: Path) -> ModelCard:
    """The card of a model in a folder."""
    return card_from_config(json.loads((folder / "config.json").read_text()))


def slot_of(card: ModelCard, name: str, modules: tuple[str, ...] = ()) -> Slot:
    """Every case: a first layer that is only held, one that is trained in part where the family has ranks."""
    layers = {}
    for index in range(card.num_layers):
        for module in modules or families.family(name).examples:
            path = families.path(card, name, index, module)
            for piece in families.pieces(card, name, module):
                full = path + (piece.tensor and families.MARK + piece.tensor)
                trained = piece.rows(RANK) if index else 0
                layers[full] = LayerSlot(piece.height or ROWS, piece.width, piece.rows(HELD), trained)
    return Slot(layers)
