"""Tiny encoders of each tested architecture, with random weights, for tests that need no real language."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from edge_runtime.train.data import Example, Message

COLOURS = {"warm": ("red", "orange", "yellow"), "cold": ("blue", "teal"), "none": ("grey", "black", "white")}


def write_encoder(model_type: str, folder: Path, tokenizer_of: Path) -> Path:
    """A folder with an encoder of that architecture: hidden 32, 2 layers, vocabulary 512, 64 positions, fp32."""
    import torch  # noqa: PLC0415 - a heavy extra
    import transformers  # noqa: PLC0415 - as above

    for file in tokenizer_of.glob("*token*"):
        shutil.copy(file, folder / file.name)
    sizes: dict[str, Any] = {"vocab_size": 512, "max_position_embeddings": 64, "pad_token_id": 0}
    if model_type == "distilbert":
        sizes |= {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    else:
        sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.AutoConfig.for_model(model_type, **sizes, initializer_range=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


def labelled(text: str, label: str) -> Example:
    """A text and its label, as rows of a label task are."""
    return Example((Message("user", text), Message("assistant", label)))


def colours(count: int = 48) -> list[Example]:
    """Texts of unequal length that name one colour; the label is what kind of colour it is."""
    found = []
    for index in range(count):
        label = sorted(COLOURS)[index % 3]
        colour = COLOURS[label][index % len(COLOURS[label])]
        found.append(labelled(f"{'the ' * (index % 5)}{colour} text {index % 7}", label))
    return found
