"""PEFT: a folder that `PeftModel.from_pretrained(base, folder)` loads.

Source of the format: PEFT's save format; `edge_runtime.lora.files` writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from edge_runtime.errors import ExportError, missing_extra
from edge_runtime.lora.adapter import Adapter, Matrix
from edge_runtime.lora.dense import is_dense, path_of, tensor_of
from edge_runtime.lora.files import replace_file, write_peft_folder
from export import peft_ia3, peft_prompt
from export.checks import base_of
from export.subject import Engine, Subject
from profiles.light_import import light_import

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
    form = _form(adapter)
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


def refuse(subject: Subject) -> None:
    """Find out whether PEFT has a format for the adapter.

    Raises:
        ExportError: an adapter without any direction, a family that PEFT has no format for, or one whose format needs
            the base model where there is none; names what is in the way.
    """
    _form(subject.adapter)
    if not any(subject.adapter.ranks.values()):
        raise ExportError("expected an adapter with at least one direction, found none; train it first")
    if any(tensor_of(name) == _MAGNITUDE for name in subject.adapter):
        base_of(subject)


def write(subject: Subject, folder: Path) -> None:
    """Write the adapter and a short README; raises as `refuse`, and ExportError where the folder cannot be written."""
    refuse(subject)
    export(
        subject.adapter,
        folder,
        base_name=subject.base_name,
        scaling=subject.scaling,
        of_base=_magnitudes(subject),
    )


def open_engine(subject: Subject, folder: Path) -> Engine:
    """The folder in PEFT, on the base model as it was prepared; it computes in float32.

    Raises:
        ExportError: there is no base model, or PEFT cannot load the folder.
        BaseModelError: the base model cannot be loaded.
        MissingExtraError: PEFT is not installed.
    """
    # Only here: whoever writes an adapter needs neither torch nor PEFT.
    from export.torch_engine import TorchEngine, fresh_base  # noqa: PLC0415

    model = fresh_base(base_of(subject))
    try:
        peft = light_import("peft")
    except ImportError as error:
        raise missing_extra(error.name or "peft", "client") from error
    try:
        return TorchEngine(peft.PeftModel.from_pretrained(model, folder))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ExportError(f"expected PEFT to load '{folder}'; found: {str(error).strip().splitlines()[0]}") from error


def _form(adapter: Adapter) -> _Dense | None:
    """The format of a family of tensors; None for pairs, with magnitudes or without.

    Raises:
        ExportError: PEFT has none.
    """
    kinds = {tensor_of(name) for name in adapter if is_dense(name)}
    form = next((row for row in _DENSE if kinds and kinds <= row.kinds), None)
    if kinds - {_MAGNITUDE} and form is None:
        raise ExportError(
            f"PEFT has no format for tensors of this kind: {', '.join(sorted(kinds))}; export the adapter as native"
        )
    return form


def _magnitudes(subject: Subject) -> dict[str, Matrix]:
    """Of DoRA, layer → (1, d_out), the norms of the rows of the base's own weights."""
    names = [name for name in subject.adapter if tensor_of(name) == _MAGNITUDE]
    if not names:
        return {}
    from export.opened import open_prepared  # noqa: PLC0415 - of a base, which only torch can open

    base = open_prepared(base_of(subject))
    return {name: base.read(f"{path_of(name)}.weight").float().norm(dim=1).numpy()[None] for name in names}
