"""GGUF: the whole model with the adapter in its weights, for llama.cpp and whatever is built on it, and a Modelfile.

Base and adapter are summed in float32; matrices are kept as float16 and vectors as float32, as llama.cpp's own
converter does. Smaller block types are made from the file by llama.cpp's `llama-quantize`.
"""

from __future__ import annotations

from pathlib import Path

from edge_runtime.errors import ExportError
from export.checks import base_of
from export.gguf_model import check, write_model
from export.merging import merged
from export.subject import Engine, Subject

MODEL = "model.gguf"
MODELFILE = "Modelfile"

_MODELFILE = f"""\
FROM ./{MODEL}
"""


def refuse(subject: Subject) -> None:
    """Find out whether the adapter can be merged, and whether GGUF can hold the model.

    Raises:
        ExportError: an adapter that is no change of weights, an architecture, a tokenizer or a tensor that cannot be
            written to GGUF, or no base model; names it.
        BaseModelError: the base model's weights cannot be found or read.
    """
    check(merged(subject))


def write(subject: Subject, folder: Path) -> None:
    """Write the model and a Modelfile for Ollama.

    Raises:
        ExportError: as `refuse`; a weight beyond float16; or the folder cannot be written.
        BaseModelError: as `refuse`.
    """
    write_model(merged(subject), folder / MODEL, label=base_of(subject).label, block_type="F16")
    try:
        (folder / MODELFILE).write_text(_MODELFILE, encoding="utf-8")
    except OSError as error:
        raise ExportError(f"cannot write '{folder}': {error}; choose a folder that can be written") from error


def open_engine(subject: Subject, folder: Path) -> Engine:  # noqa: ARG001 - all formats are opened alike
    """The model in llama.cpp.

    Raises:
        ExportError: llama.cpp does not accept the file.
        MissingExtraError: xllamacpp is not installed.
    """
    from export.llama_cpp import open_llama  # noqa: PLC0415 - of the extra [verify]

    return open_llama(folder / MODEL)
