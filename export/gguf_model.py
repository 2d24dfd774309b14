"""A checkpoint as a whole model in GGUF, one tensor at a time: settings, tokenizer and weights; `open_gguf` reversed.

Matrices are written in the block type asked for, vectors always in float32, as llama.cpp's converter does. Sources of
the format are those of `edge_runtime.train.gguf_names`; of `rope_freqs.weight`: llama.cpp's `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edge_runtime.errors import ExportError, missing_extra, unknown_name
from edge_runtime.train.checkpoint import Checkpoint
from edge_runtime.train.gguf_names import ARCHITECTURES, CONFIG, paired_heads, pairs, to_gguf

try:
    import gguf
    import numpy as np
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from export.gguf_tokenizer import Vocabulary, read_vocabulary
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "gguf", "client") from missing

FILE_TYPES = {"F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16}
"""Block types that a model can be written in → what GGUF calls such a file."""
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FREQUENCIES = "rope_freqs.weight"
_MATRIX = 2


def architecture_of(config: Mapping[str, Any]) -> str:
    """GGUF's name of the architecture of a model.

    Raises:
        ExportError: one that is not in `ARCHITECTURES`; lists them.
    """
    name = str(config.get("model_type"))
    if name not in ARCHITECTURES:
        raise ExportError(
            f"{unknown_name('architecture for GGUF', name, ARCHITECTURES)}; export it as merged, and convert that with "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    return name


def check(checkpoint: Checkpoint) -> Vocabulary:
    """Find out whether GGUF can hold a model, before anything is written; its tokenizer comes along.

    Raises:
        ExportError: an architecture, a tensor, a rotary embedding or a tokenizer that cannot be carried over; names it.
    """
    architecture = architecture_of(checkpoint.config)
    if lost := [name for name in checkpoint.names if to_gguf(name) is None]:
        raise ExportError(f"GGUF has no name for '{lost[0]}' of this base model ({len(lost)} such tensors)")
    kind = _rope(checkpoint.config).get("rope_type", "default")
    if kind != "default" and (kind, architecture) != ("llama3", "llama"):
        raise ExportError(
            f"the rotary embedding of this base model is scaled by '{kind}', which is not written to GGUF here; export "
            "it as merged, and convert that with llama.cpp's convert_hf_to_gguf.py"
        )
    if checkpoint.config.get("use_sliding_window"):
        raise ExportError("this base model attends through a sliding window, which GGUF's qwen2 has not")
    with TemporaryDirectory() as folder:
        checkpoint.write_companions(Path(folder))
        return read_vocabulary(Path(folder), checkpoint.shape(_EMBEDDING)[0])


def write_model(checkpoint: Checkpoint, path: Path, *, label: str, block_type: str) -> None:
    """Write a model as one GGUF file.

    Args:
        checkpoint: of an architecture in `ARCHITECTURES`.
        path: of the file; what is there is replaced.
        label: `general.name`.
        block_type: of matrices; a key of `FILE_TYPES`.

    Raises:
        ExportError: as `check`; a weight too large for the block type; or the file cannot be written.
    """
    vocabulary = check(checkpoint)
    writer = gguf.GGUFWriter(path, architecture_of(checkpoint.config))
    writer.add_type("model")
    writer.add_name(label)
    writer.add_file_type(FILE_TYPES[block_type])
    _add_settings(writer, checkpoint)
    _add_tokenizer(writer, vocabulary)
    tied = {_HEAD} if checkpoint.config.get("tie_word_embeddings") else set()
    names = [name for name in checkpoint.names if name not in tied]
    frequencies = _frequencies(checkpoint.config)
    for name in names:
        shape, kind = checkpoint.shape(name), _block_type(checkpoint, name, block_type)
        item = np.dtype(np.float16 if kind == gguf.GGMLQuantizationType.F16 else np.float32)
        writer.add_tensor_info(to_gguf(name), shape, item, int(np.prod(shape)) * item.itemsize, raw_dtype=kind)
    if frequencies is not None:
        writer.add_tensor_info(_FREQUENCIES, frequencies.shape, frequencies.dtype, frequencies.nbytes)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in names:
            writer.write_tensor_data(_stored(checkpoint, name, _block_type(checkpoint, name, block_type)))
        if frequencies is not None:
            writer.write_tensor_data(frequencies)
    except OSError as error:
        raise ExportError(f"cannot write '{path}': {error}; choose a folder with space for the model") from error
    finally:
        writer.close()


def _add_settings(writer: Any, checkpoint: Checkpoint) -> None:
    config, architecture = checkpoint.config, architecture_of(checkpoint.config)
    for key, theirs in CONFIG.items():
        value = config.get(theirs)
        if theirs == "rope_theta":
            value = _rope(config)["rope_theta"]
        if isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{architecture}.{key}", int(value))
    if config.get("head_dim") is not None:
        writer.add_value_length(int(config["head_dim"]))
    writer.add_rope_dimension_count(_head_width(config))
    writer.add_vocab_size(checkpoint.shape(_EMBEDDING)[0])


def _add_tokenizer(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    writer.add_token_merges(list(vocabulary.merges))
    for role, number in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", number)
    writer.add_add_bos_token(vocabulary.add_bos)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _block_type(checkpoint: Checkpoint, name: str, block_type: str) -> Any:
    matrix = len(checkpoint.shape(name)) == _MATRIX
    return gguf.GGMLQuantizationType[block_type if matrix else "F32"]


def _stored(checkpoint: Checkpoint, name: str, kind: Any) -> Any:
    """A tensor as it goes into the file: its rows in GGUF's order, in the block type."""
    with np.errstate(over="ignore"):  # what is too large is an error below
        parts = [gguf.quantize(rows.float().numpy(), kind) for _, rows in checkpoint.pieces(name)]
    whole = np.concatenate(parts).reshape(checkpoint.shape(name))
    if not np.isfinite(whole).all():
        raise ExportError(f"a weight of '{name}' is not finite, or too large for {kind.name}; use another base model")
    heads = paired_heads(architecture_of(checkpoint.config), checkpoint.config)
    count = next((count for part, count in heads.items() if f".{part}." in name), None)
    return whole if count is None else pairs(whole, count)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the rotary embedding, as both majors of transformers write them."""
    older = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    return {**older, **(config.get("rope_parameters") or {})}


def _head_width(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _frequencies(config: Mapping[str, Any]) -> Any:
    """(head width / 2,) what each rotation's frequency is divided by; None where that is 1."""
    kind = _rope(config).get("rope_type", "default")
    if kind == "default":
        return None
    width = _head_width(config)
    plain = _rope(config)["rope_theta"] ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](AutoConfig.for_model(**config), "cpu")
    return (plain / scaled.double().numpy()).astype(np.float32)
