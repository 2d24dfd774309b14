"""A base model with an adapter merged into its weights: a checkpoint of the sums, computed a few rows at a time.

    pair       W + b a                              magnitude  (‖W‖ + t) ⊙ (W + b a) / ‖W + b a‖, norms of rows
    scale      (1 + t) ⊙ rows of W and bias         scale_in   W with its columns times 1 + t
    bias       bias + t                             weight     w + t, of a norm
    values     W + S, S the values at the mask

Sums are taken in float32 of the weights as they are stored, so that whoever writes them rounds once. Nothing is merged
into quantised weights: they are taken from the base that they were converted from. Families that are no change of a
weight (virtual tokens, bottlenecks) are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch

from edge_runtime.errors import BaseModelError, ExportError
from edge_runtime.lora.adapter import Adapter, Matrix, Pair
from edge_runtime.lora.dense import dense_name, is_dense, path_of, tensor_of
from edge_runtime.train.base import PreparedBase
from edge_runtime.train.checkpoint import Checkpoint, open_folder
from edge_runtime.train.convert import READERS, precision_named, skeleton
from edge_runtime.train.dense_modules import mask_of
from edge_runtime.train.source import CONFIG, fingerprint, resolve
from export.subject import Subject

Change = Callable[[torch.Tensor, slice], torch.Tensor]
"""(rows in float32, which rows of the tensor they are) → the same rows, changed; of a vector, its entries."""

BIAS_SETTINGS = ("attention_bias", "mlp_bias")
"""Settings of transformers' configurations under which linear layers have a bias that they lack otherwise."""


def refuse(subject: Subject) -> None:
    """Find out whether the adapter can be merged, and into the base model at hand if there is one.

    Raises:
        ExportError: a family that is no change of weights, or layers that the base model cannot hold; names them.
        BaseModelError: the base model's weights cannot be found or read.
    """
    _check_kinds(subject.adapter)
    if subject.prepared is not None:
        merged(subject)


def merged(subject: Subject) -> Checkpoint:
    """The base model's own weights with the adapter in them; float32 rows, of which none is read yet.

    Raises:
        ExportError: a family that is no change of weights, layers that the base model cannot hold, or no base model.
        BaseModelError: the base model's weights cannot be found or read.
    """
    _check_kinds(subject.adapter)
    base = original(subject)
    config = _with_biases(base.config, subject.adapter)
    model = model_of(config)
    _check_layers(subject.adapter, base, model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    added = tuple(name for name in shapes if name.endswith(".bias") and name not in base.names)
    changes = dict(_changes(subject.adapter))

    def rows(name: str, start: int, stop: int) -> torch.Tensor:
        found = torch.zeros(stop - start) if name in added else base.rows(name, start, stop).float()
        return changes[name](found, slice(start, stop)) if name in changes else found

    def shape(name: str) -> tuple[int, ...]:
        return shapes[name] if name in added else base.shape(name)

    return replace(base, config=config, names=(*base.names, *added), rows=rows, shape=shape)


def original(subject: Subject) -> Checkpoint:
    """The weights to merge into: those that were prepared where they are plain, else those they were quantised from.

    Raises:
        ExportError: no base model was given.
        BaseModelError: the weights are quantised, and their original cannot be found or is another base model.
    """
    if subject.prepared is None:
        raise ExportError("a merged model needs the base model's weights; found none; give them with --base")
    prepared = subject.prepared
    if precision_named(prepared.precision).quantise is None:
        return open_folder(prepared.folder)
    source = resolve(subject.base_name)
    checkpoint = READERS[source.kind](source.path)
    if "quantization_config" in checkpoint.config:
        raise BaseModelError(
            f"an adapter is not merged into {prepared.precision} weights, and '{subject.base_name}' has no others; "
            "give the original base model with --base"
        )
    _check_same(prepared, fingerprint(source), subject.base_name)
    return checkpoint


def _check_same(prepared: PreparedBase, found: str, name: str) -> None:
    if found != prepared.fingerprint:
        raise BaseModelError(
            f"expected '{name}' to be the base model that was prepared, {prepared.fingerprint[:16]}…; found "
            f"{found[:16]}…; give the fleet's base model with --base"
        )


def _check_kinds(adapter: Adapter) -> None:
    if not any(adapter.ranks.values()):
        raise ExportError("expected an adapter with at least one direction or row, found none; train it first")
    beyond = [name for name in adapter if is_dense(name) and tensor_of(name) not in _KINDS]
    if beyond:
        raise ExportError(
            f"'{beyond[0]}' is no change of the base model's weights, and {len(beyond)} such tensors cannot be merged; "
            "export the adapter as native, or as peft where it has the family"
        )


def _with_biases(config: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """A configuration whose layers have the biases that the adapter brings, where there is a setting for them.

    Of a setting that gives a bias to further layers, these get one of zeros.
    """
    brought = {path_of(name) for name in adapter if tensor_of(name) == "bias"}
    found = dict(config)
    for setting in BIAS_SETTINGS if brought else ():
        before, after = _biases(found), _biases({**found, setting: True})
        if brought & (after - before):
            found[setting] = True
    return found


def _biases(config: Mapping[str, Any]) -> set[str]:
    return {name.removesuffix(".bias") for name, _ in model_of(config).named_parameters() if name.endswith(".bias")}


def model_of(config: Mapping[str, Any]) -> Any:
    """The model that a configuration describes, without memory for its weights; errors as of `convert.skeleton`."""
    with TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(json.dumps(dict(config)), encoding="utf-8")
        return skeleton(Path(folder))


def _check_layers(adapter: Adapter, base: Checkpoint, model: Any) -> None:
    """Every layer of the adapter is one of the model's own, of its shape, and alone in having its weight."""
    modules = dict(model.named_modules())
    for name in adapter:
        path, kind = path_of(name), tensor_of(name)
        module = modules.get(path)
        if module is None:
            raise ExportError(f"the base model has no layer '{path}'; export with the fleet's base model")
        if f"{path}.weight" not in base.names:
            raise ExportError(
                f"layer '{path}' shares its weight with the embedding, which a merge would change too; train other "
                "layers, or export the adapter as peft"
            )
        if kind == "bias" and getattr(module, "bias", None) is None:
            raise ExportError(
                f"layer '{path}' has no bias in a {type(model).__name__}, and no setting gives it one; export the "
                "adapter as native"
            )
        expected = _KINDS[kind].shape(base.shape(f"{path}.weight"))
        if adapter.shape_of(name)[1 if kind else 0 :] != expected:
            raise ExportError(
                f"layer '{name}' has the shape {adapter.shape_of(name)}, where the base model's weight is "
                f"{base.shape(f'{path}.weight')}; export with the fleet's base model"
            )


def _changes(adapter: Adapter) -> dict[str, Change]:
    """Tensor of the checkpoint → what becomes of its rows, in the order in which the live model computes."""
    found: dict[str, Change] = {}
    for name, pair in adapter.items():
        path, kind = path_of(name), _KINDS[tensor_of(name)]
        if dense_name(path, "magnitude") in adapter and not is_dense(name):
            continue  # a magnitude needs the norms of the weight as it was, and adds the pair itself
        for tensor, change in kind.change(name, pair, adapter.get(path)):
            full = f"{path}.{tensor}"
            found[full] = _then(found[full], change) if full in found else change
    return found


def _then(first: Change, second: Change) -> Change:
    return lambda rows, at: second(first(rows, at), at)


_Changes = Iterator[tuple[str, Change]]


def _pair(_name: str, pair: Pair, _beside: Pair | None) -> _Changes:
    yield "weight", partial(_plus_product, pair)


def _plus_product(pair: Pair, rows: torch.Tensor, at: slice) -> torch.Tensor:
    return torch.addmm(rows, torch.from_numpy(pair.b[at]), torch.from_numpy(pair.a))


def _magnitude(_name: str, pair: Pair, beside: Pair | None) -> _Changes:
    change = _vector(pair)

    def scaled(rows: torch.Tensor, at: slice) -> torch.Tensor:
        turned = rows if beside is None else _plus_product(beside, rows, at)
        under = turned.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        factor: torch.Tensor = (rows.norm(dim=1) + change[at]) / under
        return turned * factor[:, None]

    yield "weight", scaled


def _scale(_name: str, pair: Pair, _beside: Pair | None) -> _Changes:
    factor = 1.0 + _vector(pair)
    yield "weight", lambda rows, at: rows * factor[at, None]
    yield "bias", lambda entries, at: entries * factor[at]


def _scale_in(_name: str, pair: Pair, _beside: Pair | None) -> _Changes:
    factor = 1.0 + _vector(pair)
    yield "weight", lambda rows, _at: rows * factor


def _added_to(tensor: str) -> Callable[[str, Pair, Pair | None], _Changes]:
    def change(_name: str, pair: Pair, _beside: Pair | None) -> _Changes:
        added = _vector(pair)
        yield tensor, lambda entries, at: entries + added[at]

    return change


def _values(name: str, pair: Pair, _beside: Pair | None) -> _Changes:
    values: Matrix = pair.product().ravel()

    @cache  # drawing a mask takes a while, and refusing needs none
    def mask(d_out: int, d_in: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return mask_of(name, values.size, (d_out, d_in))

    def spread(rows: torch.Tensor, at: slice) -> torch.Tensor:
        d_in = rows.shape[1]
        places = mask(pair.shape[1] - d_in, d_in)  # a row of values is d_out + d_in long
        here = (places >= at.start * d_in) & (places < at.stop * d_in)
        found = rows.flatten().clone()
        found[torch.from_numpy(places[here] - at.start * d_in)] += torch.from_numpy(values[here])
        return found.view_as(rows)

    yield "weight", spread


def _vector(pair: Pair) -> torch.Tensor:
    return torch.from_numpy(pair.product()[0])


class _Kind(NamedTuple):
    """How one kind of tensor is merged.

    Attributes:
        change: (layer's name, its pair, the low-rank pair beside it) → parameters of the module, and what becomes of
            them.
        shape: shape of the module's weight → the pair's shape or, of a tensor, the length of its rows.
    """

    change: Callable[[str, Pair, Pair | None], _Changes]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]


def _out(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:1]


_KINDS: Mapping[str, _Kind] = {
    "": _Kind(_pair, lambda shape: shape),
    "magnitude": _Kind(_magnitude, _out),
    "scale": _Kind(_scale, _out),
    "scale_in": _Kind(_scale_in, lambda shape: shape[1:]),
    "bias": _Kind(_added_to("bias"), _out),
    "weight": _Kind(_added_to("weight"), _out),
    "values": _Kind(_values, lambda shape: (sum(shape),)),
}
"""Kinds of `edge_runtime.train.dense_modules` that change weights, and pairs."""
