"""Prompt tuning as a PEFT folder: the embeddings of the virtual tokens, start and change together.

Source of the format: PEFT's `PromptTuningConfig`. PEFT needs the sizes of the base in it only where it makes a prompt
anew, but asks for them; the width is that of the prompt.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.files import write_folder
from edge_runtime.lora.named_draws import virtual_rows

KINDS = frozenset({"prompt"})
"""The tensors of this family."""


def write(adapter: Adapter, folder: Path, base_name: str) -> None:
    """Write weights, then the configuration, each by an atomic rename.

    Raises:
        ExportError: the folder cannot be written.
    """
    (name, pair), *_ = adapter.items()
    rows = virtual_rows(name, pair.rank, pair.shape[1]) + pair.a
    config = {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "num_attention_heads": 1,
        "num_layers": 1,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": pair.rank,
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "task_type": "CAUSAL_LM",
        "token_dim": pair.shape[1],
    }
    write_folder(folder, {"prompt_embeddings": np.ascontiguousarray(rows, np.float32)}, config)
