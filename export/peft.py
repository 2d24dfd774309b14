"""PEFT: a folder that `PeftModel.from_pretrained(base, folder)` loads.

Source of the format: PEFT's save format; `edge_runtime.lora.files` writes it.
"""

from __future__ import annotations

from pathlib import Path

from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.files import replace_file, write_peft_folder

README = "README.md"

_README = """\
---
base_model: {base_name}
library_name: peft
---

A LoRA adapter for `{base_name}`: {layers} layers, rank {ranks}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base_name}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""


def export(adapter: Adapter, folder: Path, *, base_name: str, scaling: float) -> Path:
    """Write the adapter as a PEFT folder with a short README.

    Args:
        adapter: a personal or a global one; ranks may differ from layer to layer.
        folder: created if absent. `adapter_model.safetensors`, `adapter_config.json` and `README.md` in it are
            replaced, other files left alone.
        base_name: hub id or path under which the reader finds the base model.
        scaling: lora_alpha / r of every layer; the fleet's own keeps the factors as they were trained.

    Returns:
        The folder.

    Raises:
        ExportError: an adapter without any direction, or a folder that cannot be written.
    """
    write_peft_folder(adapter, folder, base_name=base_name, scaling=scaling)
    ranks = sorted({rank for rank in adapter.ranks.values() if rank})
    shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    layers = sum(rank > 0 for rank in adapter.ranks.values())
    text = _README.format(base_name=base_name, layers=layers, ranks=shown)
    replace_file(folder / README, lambda path: path.write_text(text, encoding="utf-8"))
    return folder
