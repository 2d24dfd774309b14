"""(IA)³ as a PEFT folder: one vector for each layer, of its outputs or, in a feed-forward layer, of its inputs.

Source of the format: PEFT's `IA3Config` and `IA3Layer`. An Adapter has what changed, PEFT the factor itself: 1 + t.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_runtime.lora.adapter import Adapter, Matrix
from edge_runtime.lora.dense import path_of, tensor_of
from edge_runtime.lora.files import write_folder

KINDS = frozenset({"scale", "scale_in"})
"""The tensors of this family."""


def write(adapter: Adapter, folder: Path, base_name: str) -> None:
    """Write weights, then the configuration, each by an atomic rename.

    Raises:
        ExportError: the folder cannot be written.
    """
    tensors: dict[str, Matrix] = {}
    inputs = []
    for name, pair in adapter.items():
        path, vector = path_of(name), 1.0 + pair.product()
        if tensor_of(name) == "scale_in":
            inputs.append(path)
        else:
            vector = vector.T
        tensors[f"base_model.model.{path}.ia3_l"] = np.ascontiguousarray(vector, np.float32)
    config = {
        "base_model_name_or_path": base_name,
        "fan_in_fan_out": False,
        "feedforward_modules": sorted(inputs),
        "inference_mode": True,
        "init_ia3_weights": True,
        "modules_to_save": None,
        "peft_type": "IA3",
        "target_modules": sorted(path_of(name) for name in adapter),
        "task_type": "CAUSAL_LM",
    }
    write_folder(folder, tensors, config)
