"""What a checkpoint's headers list, held against what its configuration promises."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from edge_runtime.errors import BaseModelError
from profiles.brief import brief
from profiles.card import HEAD, ModelCard, tensor_shapes

# Beside a weight W that was quantised: in 4 bits W.absmax and so on; in 8 bits `scale` in place of `weight`, which
# bitsandbytes calls SCB.
_FOUR_BIT_STATE = re.compile(r"\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(\w+))$")
_EIGHT_BIT_STATE = re.compile(r"\.(?:scale|SCB|weight_format)$")
# Tables of the rotary embedding: they are derived from the configuration, and no parameters.
_DERIVED = re.compile(r"(?:^|\.)(?:rotary_emb\.inv_freq|rope_freqs\.weight|attn_rot_embd(?:\.weight)?)$")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a header describes it.

    Attributes:
        shape: sizes in torch's order; that of a packed 4-bit weight is the packed one.
        dtype: as this project writes types: fp32, bf16, int8, q4_k.
        size: bytes on disk.
    """

    shape: tuple[int, ...]
    dtype: str
    size: int


def with_tensors(card: ModelCard, tensors: Mapping[str, TensorInfo], where: str) -> ModelCard:
    """The card with `stored` filled in, after every tensor was found as the configuration promises it.

    Args:
        card: what the configuration says.
        tensors: name, as transformers calls it, → what the headers say; all files of the checkpoint together.
        where: how messages call the checkpoint.

    Raises:
        BaseModelError: the first tensor that is missing, has another shape, or does not belong there; says both shapes.
    """
    expected: set[str] = set()
    for name, shape in tensor_shapes(card):
        _check(name, shape, tensors, where)
        expected.add(name)
    if card.tied and HEAD in tensors:
        # A head that is written although it is the embedding: once on disk too many, in memory one matrix.
        _check(HEAD, (card.vocab_size, card.hidden_size), tensors, where)
        expected.add(HEAD)
    for name, tensor in tensors.items():
        if name not in expected and not _is_state(name, tensors) and not _DERIVED.search(name):
            raise BaseModelError(
                f"{where}: expected the tensors of a {card.model_type} with {card.num_layers} layers; found "
                f"{brief(name)} of shape {tensor.shape} as well; give weights that fit their configuration"
            )
    return replace(card, stored=_stored(tensors))


def _check(name: str, shape: tuple[int, ...], tensors: Mapping[str, TensorInfo], where: str) -> None:
    if name not in tensors:
        raise BaseModelError(
            f"{where}: expected the tensor '{name}' of shape {shape}; found none of that name; fetch the model again"
        )
    found = tensors[name]
    if f"{name}.absmax" not in tensors:
        if found.shape != shape:
            raise BaseModelError(
                f"{where}: expected the tensor '{name}' of shape {shape}, as its configuration says; found "
                f"{found.shape}; give weights that fit their configuration"
            )
        return
    elements = 1
    for width in shape:
        elements *= width
    if found.size != (elements + 1) // 2:
        raise BaseModelError(
            f"{where}: expected the tensor '{name}' of shape {shape} packed in 4 bits, {(elements + 1) // 2} bytes; "
            f"found shape {found.shape}, {found.size} bytes; prepare the base again"
        )


def _is_state(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor describes the quantisation of another one that is quantised so."""
    weight = _belongs_to(name)
    if weight == name or weight not in tensors:
        return False
    return f"{weight}.absmax" in tensors or tensors[weight].dtype == "int8"


def _belongs_to(name: str) -> str:
    """The weight that a tensor describes the quantisation of; the name itself if it is none such."""
    eight_bit = _EIGHT_BIT_STATE.sub(".weight", name)
    return _FOUR_BIT_STATE.sub("", eight_bit)


def _stored(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Type → bytes, the largest first; a quantised weight and its state count as one, in 4 bits as the state says."""
    four_bit = {name.removesuffix(".absmax"): "4bit" for name in tensors if name.endswith(".absmax")}
    for name in tensors:
        state = _FOUR_BIT_STATE.search(name)
        if state and state[1]:
            four_bit[_belongs_to(name)] = state[1]
    totals: dict[str, int] = {}
    for name, tensor in tensors.items():
        weight = _belongs_to(name)
        dtype = four_bit.get(weight) or tensors.get(weight, tensor).dtype
        totals[dtype] = totals.get(dtype, 0) + tensor.size
    return dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))
