"""PEFT: a folder that `PeftModel.from_pretrained(base, folder)` loads.

Source of the format: PEFT's save format; `edge_runtime.lora.files` writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from edge_runtime.errors import ExportError
from edge_runtime.lora.adapter import Adapter, Matrix
from edge_runtime.lora.dense import is_dense, path_of, tensor_of
from edge_runtime.lora.files import replace_file, write_peft_folder
from export import peft_ia3, peft_prompt

README = "README.md"

_README = """\
---
base_model: {base_name}
library_name: peft
---

{kind} for `{base_name}`: {layers} layers{ranks}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base_name}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""


class _Dense(NamedTuple):
    """A format of PEFT's for a family of tensors: which ones, how it is written and what it is called."""

    kinds: frozenset[str]
    write: Callable[[Adapter, Path, str], None]
    called: str


_DENSE = (
    _Dense(peft_ia3.KINDS, peft_ia3.write, "An (IA)³ adapter"),
    _Dense(peft_prompt.KINDS, peft_prompt.write, "A trained prompt"),
)
_MAGNITUDE = "magnitude"


def export(
    adapter: Adapter, folder: Path, *, base_name: str, scaling: float, of_base: Mapping[str, Matrix] | None = None
) -> Path:
    """Write the adapter as a PEFT folder with a short README.

    Args:
        adapter: a personal or a global one; ranks may differ from layer to layer.
        folder: created if absent. `adapter_model.safetensors`, `adapter_config.json` and `README.md` in it are
            replaced, other files left alone.
        base_name: hub id or path under which the reader finds the base model.
        scaling: lora_alpha / r of every layer; the fleet's own keeps the factors as they were trained.
        of_base: of DoRA, the magnitudes that the base has, from the live model; see `train.mixed.of_base`.

    Returns:
        The folder.

    Raises:
        ExportError: an adapter without any direction, of a family that PEFT has no format for, or a folder that cannot
            be written.
    """
    kinds = {tensor_of(name) for name in adapter if is_dense(name)}
    form = next((row for row in _DENSE if kinds and kinds <= row.kinds), None)
    if kinds - {_MAGNITUDE} and form is None:
        raise ExportError(
            f"PEFT has no format for tensors of this kind: {', '.join(sorted(kinds))}; export the adapter as native"
        )
    known = of_base or {}
    if missing := [name for name in adapter if tensor_of(name) == _MAGNITUDE and name not in known]:
        raise ExportError(
            f"PEFT's format has the base's own numbers in '{missing[0]}', which only a device that trains has; "
            "export the adapter as native"
        )
    ranks = sorted({rank for name, rank in adapter.ranks.items() if rank and not is_dense(name)})
    layers = sum(rank > 0 for name, rank in adapter.ranks.items() if form is not None or not is_dense(name))
    if form is not None:
        form.write(adapter, folder, base_name)
        kind, shown = form.called, ""
    else:
        pairs = adapter.only(name for name in adapter if not is_dense(name))
        magnitudes = {
            path_of(name): (known[name] + pair.product())[0] for name, pair in adapter.items() if is_dense(name)
        }
        write_peft_folder(pairs, folder, base_name=base_name, scaling=scaling, magnitudes=magnitudes)
        kind = "A DoRA adapter" if magnitudes else "A LoRA adapter"
        shown = f", rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
    text = _README.format(kind=kind, base_name=base_name, layers=layers, ranks=shown)
    replace_file(folder / README, lambda path: path.write_text(text, encoding="utf-8"))
    return folder
