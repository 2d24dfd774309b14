"""GGUF: a LoRA adapter that llama.cpp and Ollama put beside a base model in GGUF, and a Modelfile.

llama.cpp multiplies each tensor by one alpha for all over its own rank. The alpha written is the largest rank, and each
`b` holds the rest: so a layer of that rank leaves bit for bit, one of a smaller rank is rounded once, and whatever
rsLoRA or patterns made of its scale is folded in already.

Source of the format: llama.cpp's `llama-adapter.cpp` and `convert_lora_to_gguf.py`. The latter writes the alpha of the
configuration as it stands, which is wrong under rsLoRA and where patterns give layers scales of their own.
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edge_runtime.errors import ExportError, missing_extra, unknown_name
from edge_runtime.train.gguf_names import BLOCK, paired_heads, pairs, to_gguf
from export.checks import base_of, only_pairs
from export.subject import Engine, Subject
from profiles.packaged import ALIASES

try:
    import gguf
    import numpy as np

    from edge_runtime.train.source import read_config
    from export.gguf_model import architecture_of, write_model
    from export.opened import open_prepared
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "gguf", "client") from missing

ADAPTER = "adapter.gguf"
MODELFILE = "Modelfile"
PROJECTIONS = tuple(path for path in BLOCK.values() if path.endswith("_proj"))
"""The layers of a block that a pair may change: those that llama.cpp multiplies with an adapter beside them."""

_MODELFILE = """\
# The adapter changes this base model and no other: {base_name}.
# Put its GGUF file beside this one, or name here the place where it is.
FROM ./{file}
ADAPTER ./{adapter}
"""


def refuse(subject: Subject) -> None:
    """Find out whether GGUF can hold the adapter.

    Raises:
        ExportError: an adapter without a direction, one that is more than pairs, layers or an architecture that
            llama.cpp has no place for, or no base model; names them.
    """
    check_layers(subject)
    _architecture(subject)


def check_layers(subject: Subject) -> None:
    """The adapter is made of pairs on the projections of decoder layers, and of nothing else.

    Raises:
        ExportError: it is not; names what is in the way.
    """
    only_pairs(subject, "GGUF")
    for name in subject.adapter:
        block = re.fullmatch(r"model\.layers\.\d+\.(.+)", name)
        if block is None or block[1] not in PROJECTIONS:
            raise ExportError(f"{unknown_name('target module for GGUF', name, PROJECTIONS)}; export it as peft")


def write(subject: Subject, folder: Path) -> None:
    """Write the adapter and a Modelfile for Ollama.

    Raises:
        ExportError: as `refuse`, or the folder cannot be written.
        MissingExtraError: the library gguf is not installed.
    """
    check_layers(subject)
    architecture, config = _architecture(subject)
    heads = paired_heads(architecture, config)
    filled = {name: pair for name, pair in subject.adapter.items() if pair.rank}
    alpha = max(pair.rank for pair in filled.values())
    writer = gguf.GGUFWriter(folder / ADAPTER, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(alpha))
    for name, pair in filled.items():
        b = pair.b * np.float32(pair.rank / alpha)
        count = heads.get(name.rpartition(".")[2])
        tensor = to_gguf(f"{name}.weight")
        writer.add_tensor(f"{tensor}.lora_a", np.ascontiguousarray(pair.a))
        writer.add_tensor(f"{tensor}.lora_b", np.ascontiguousarray(b) if count is None else pairs(b, count))
    text = _MODELFILE.format(base_name=subject.base_name, file=_base_file(subject.base_name), adapter=ADAPTER)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        (folder / MODELFILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ExportError(f"cannot write '{folder}': {error}; choose a folder that can be written") from error
    finally:
        writer.close()


def open_engine(subject: Subject, folder: Path) -> Engine:
    """The adapter in llama.cpp, beside the base model as it was prepared, which is written as float32 GGUF for it.

    Any GGUF file of the base would do to run it. Compared is with the weights that the live model has, so that what
    differs is the adapter's and not that of another rounding of the base.

    Raises:
        ExportError: the base cannot be written as GGUF, or llama.cpp does not accept the files.
        MissingExtraError: xllamacpp is not installed.
    """
    from export.llama_cpp import open_llama  # noqa: PLC0415 - of the extra [verify]

    prepared = base_of(subject)
    beside = TemporaryDirectory(prefix=".gguf-base-", dir=folder.parent)
    try:
        base = Path(beside.name) / "base.gguf"
        write_model(open_prepared(prepared), base, label=prepared.label, block_type="F32")
        return open_llama(base, folder / ADAPTER, on_close=beside.cleanup)
    except BaseException:
        beside.cleanup()
        raise


def _architecture(subject: Subject) -> tuple[str, dict[str, Any]]:
    """GGUF's name of the base's architecture, and its configuration."""
    config = read_config(base_of(subject).folder)
    return architecture_of(config), config


def _base_file(base_name: str) -> str:
    """What the base's GGUF file is called, as far as its name tells."""
    if base_name in ALIASES:
        return Path(ALIASES[base_name].file).name
    name = Path(base_name).name
    return name if name.endswith(".gguf") else f"{name}.gguf"
