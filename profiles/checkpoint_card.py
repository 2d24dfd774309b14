"""The card of a model in transformers' form: config.json, and the headers of its safetensors files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edge_runtime.errors import BaseModelError
from profiles.brief import brief
from profiles.byte_source import Files, whole
from profiles.card import HEAD, ModelCard, card_from_config
from profiles.safetensors_header import LENGTH_BYTES, safetensors_header
from profiles.strict_json import json_object
from profiles.tensors import TensorInfo, with_tensors

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG_LIMIT = 4 << 20
INDEX_LIMIT = 16 << 20
FILES_LIMIT = 1000
# How bases that were prepared here say that they are quantised: in 4 bits, and in 8.
_OURS = ("bitsandbytes", "edge-runtime-int8")
# A name of a file, not a path out of the folder.
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")


def checkpoint_card(files: Files, name: str) -> ModelCard | None:
    """The card of a model; where it has no safetensors, that of its config.json alone; None without a config.json.

    Args:
        files: the model's.
        name: how messages call the model.

    Raises:
        BaseModelError: a file that cannot be, weights quantised in no way that is prepared here, or a tensor that does
            not fit the configuration.
    """
    source = files.open(CONFIG, CONFIG_LIMIT + 1)
    if source is None:
        return None
    config = json_object(whole(source, CONFIG_LIMIT), source.name)
    _check_quantisation(files, config)
    placed = weight_files(files)
    if not placed:
        return replace(card_from_config(config, name), origin=f"{source.name} alone: no safetensors beside it")
    tensors = _tensors(files, placed)
    if config.get("tie_word_embeddings") is None:
        config["tie_word_embeddings"] = HEAD not in tensors
    card = with_tensors(card_from_config(config, name), tensors, files.name)
    headers = "the header of its weights" if len(placed) == 1 else f"the headers of {len(placed)} files of weights"
    return replace(card, origin=f"{source.name} and {headers}")


def weight_files(files: Files) -> dict[str, tuple[str, ...]]:
    """File → the tensors that the index promises in it (none without an index); empty: no safetensors.

    Raises:
        BaseModelError: an index that is none, or names files that it cannot.
    """
    index = files.open(INDEX, INDEX_LIMIT + 1)
    if index is None:
        return {SINGLE: ()} if files.open(SINGLE, LENGTH_BYTES) is not None else {}
    weight_map = json_object(whole(index, INDEX_LIMIT), index.name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BaseModelError(f"expected a 'weight_map' in {index.name}; found none; fetch the model again")
    placed: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise BaseModelError(
                f"{index.name}: expected the name of a safetensors file for {brief(tensor)}; found "
                f"{brief(file)}; fetch the model again"
            )
        placed.setdefault(file, []).append(tensor)
    if len(placed) > FILES_LIMIT:
        raise BaseModelError(f"expected at most {FILES_LIMIT} files in {index.name}; found {len(placed)}")
    return {file: tuple(placed[file]) for file in sorted(placed)}


def _tensors(files: Files, placed: Mapping[str, tuple[str, ...]]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file, promised in placed.items():
        source = files.open(file, LENGTH_BYTES)
        if source is None:
            raise BaseModelError(f"expected the weights {file} in {files.name}; found no such file; fetch them again")
        found = safetensors_header(source)
        lacking = next((name for name in promised if name not in found), None)
        if lacking is not None:
            raise BaseModelError(
                f"expected the tensor {brief(lacking)} in {source.name}, as {INDEX} says; found none of that "
                f"name; fetch the model again"
            )
        twice = next((name for name in found if name in tensors), None)
        if twice is not None:
            raise BaseModelError(
                f"expected the tensor {brief(twice)} once in {files.name}; found it in {file} again; fetch the "
                f"model again"
            )
        tensors |= found
    return tensors


def _check_quantisation(files: Files, config: Mapping[str, Any]) -> None:
    quantisation = config.get("quantization_config")
    if quantisation is None:
        return
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
    if method not in _OURS:
        raise BaseModelError(
            f"expected plain weights, or a base prepared here, in {files.name}; found them quantised by "
            f"{brief(method)}; give the model that they were made from"
        )
