"""Hypothesis strategies for the values that travel: pairs, adapters, slots, and any pydantic model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from edge_runtime.lora.adapter import Adapter, LayerSlot, Pair, Slot
from edge_runtime.wire import messages
from edge_runtime.wire.blobs import BlobRef

Model = TypeVar("Model", bound=BaseModel)

laws = settings(max_examples=30, deadline=None)
"""No deadline: a law is about values, and the machine may be busy."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
PROJECTIONS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "attn.1.out")

names = st.builds(
    lambda first, rest: first + rest,
    st.sampled_from(LETTERS + "0123456789"),
    st.text(LETTERS + "0123456789._-", max_size=63),
)
"""Names of fleets and clients."""

digests = st.binary(min_size=32, max_size=32).map(bytes.hex)

layer_names = st.one_of(
    st.builds("model.layers.{}.{}".format, st.integers(0, 120), st.sampled_from(PROJECTIONS)),
    # Any dotted path: levels that are numbers, that only look like numbers, and none at all.
    st.lists(
        st.sampled_from(["a", "h_1", "block", "0", "1", "12", "007", "00", "1a", "9" * 30]), min_size=1, max_size=5
    ).map(".".join),
)
"""Module paths."""


def gaussian(shape: tuple[int, int], rank: int, seed: int) -> Pair:
    """A pair in general position."""
    draw = np.random.default_rng(seed)
    a = draw.standard_normal((rank, shape[1]), dtype=np.float32)
    return Pair(a, draw.standard_normal((shape[0], rank), dtype=np.float32))


@st.composite
def pairs(draw: st.DrawFn, *, least_rank: int = 0, decades: tuple[int, int] = (-6, 6)) -> Pair:
    """Small pairs, also wider than their layer, whose directions differ in size by up to that many powers of ten.

    The numbers come from a seed, because drawing them one by one takes most of a test's time.
    """
    shape, rank = (draw(st.integers(1, 6)), draw(st.integers(1, 6))), draw(st.integers(least_rank, 7))
    seed = draw(st.integers(0, 1 << 32))
    plain = gaussian(shape, rank, seed)
    sizes = (10.0 ** np.random.default_rng(seed).uniform(*decades, (2, rank))).astype(np.float32)
    pair = Pair(plain.a * sizes[0][:, None], plain.b * sizes[1])
    match draw(st.sampled_from(["whole", "zero b", "zero direction", "zero entries"])):
        case "zero b":
            pair.b[:] = 0
        case "zero direction":
            pair.a[: rank // 2], pair.b[:, : rank // 2] = 0, 0
        case "zero entries":
            pair.a[:, 0], pair.b[0] = 0, 0
    return pair


def adapters(
    *, least_rank: int = 0, decades: tuple[int, int] = (-6, 6), least_layers: int = 0
) -> st.SearchStrategy[Adapter]:
    """Adapters of a few layers of any shapes and ranks."""
    layers = pairs(least_rank=least_rank, decades=decades)
    return st.dictionaries(layer_names, layers, min_size=least_layers, max_size=3).map(Adapter)


@st.composite
def layer_slots(draw: st.DrawFn) -> LayerSlot:
    """What a device may do with a layer."""
    held = draw(st.integers(0, 4096))
    return LayerSlot(draw(st.integers(1, 1 << 24)), draw(st.integers(1, 1 << 24)), held, draw(st.integers(0, held)))


@st.composite
def slots(draw: st.DrawFn) -> Slot:
    """Slots in which many layers are treated alike, as in a real plan, and some are not."""
    kinds = draw(st.lists(layer_slots(), min_size=1, max_size=3))
    return Slot(draw(st.dictionaries(layer_names, st.sampled_from(kinds), min_size=1, max_size=30)))


@st.composite
def blob_refs(draw: st.DrawFn) -> BlobRef:
    """References to blobs of up to a few thousand chunks."""
    chunk_bytes = draw(st.integers(1024, 8 << 20))
    return BlobRef(sha256=draw(digests), size=draw(st.integers(0, 4096 * chunk_bytes)), chunk_bytes=chunk_bytes)


_BOUNDS = {"ge": "min_value", "gt": "min_value", "le": "max_value", "lt": "max_value"}


def _numbers(kind: type, limits: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    bounds = {_BOUNDS[name]: value for name, value in limits.items() if name in _BOUNDS}
    if kind is int:
        return st.integers(bounds.get("min_value", -(1 << 60)), bounds.get("max_value", 1 << 60))
    return st.floats(
        **bounds, exclude_min="gt" in limits, exclude_max="lt" in limits, allow_nan=False, allow_infinity=False
    )


def _limits(metadata: Sequence[Any]) -> dict[str, Any]:
    """What pydantic demands of a value beyond its type: bounds, lengths, a pattern."""
    found: dict[str, Any] = {}
    for item in metadata:
        found |= _limits(item.metadata) if isinstance(item, FieldInfo) else {}
        for name in (*_BOUNDS, "min_length", "max_length", "pattern"):
            if not isinstance(item, FieldInfo) and getattr(item, name, None) is not None:
                found[name] = getattr(item, name)
    return found


def values(annotation: Any, metadata: Sequence[Any] = ()) -> st.SearchStrategy[Any]:
    """Values of a field, from its annotation, so that a new field is covered by the laws without being named here."""
    if annotation in _SPECIAL:
        return _SPECIAL[annotation]()
    limits, inner = _limits(metadata), get_args(annotation)
    origin = get_origin(annotation) or annotation
    if origin is Annotated:
        return values(inner[0], [*metadata, *inner[1:]])
    if origin is Literal:
        return st.sampled_from(inner)
    if origin in {Union, UnionType}:
        return st.one_of([values(choice, metadata) for choice in inner])
    if origin is tuple and inner[-1] is Ellipsis:
        few = st.lists(values(inner[0]), min_size=limits.get("min_length", 0), max_size=3)
        return few.map(tuple)
    if origin is tuple:
        return st.tuples(*(values(choice) for choice in inner))
    if issubclass(origin, BaseModel):
        return models(origin)
    if origin is str and "pattern" in limits:
        return st.from_regex(limits["pattern"], fullmatch=True).filter(
            lambda text: len(text) <= limits.get("max_length", 128)
        )
    return _PLAIN[origin](limits)


_PLAIN: Mapping[type, Callable[[Mapping[str, Any]], st.SearchStrategy[Any]]] = {
    NoneType: lambda _: st.none(),
    bool: lambda _: st.booleans(),
    int: lambda limits: _numbers(int, limits),
    float: lambda limits: _numbers(float, limits),
    str: lambda limits: st.text(min_size=limits.get("min_length", 0), max_size=12),
    Path: lambda _: st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12).map(Path),
}

_SPECIAL: Mapping[Any, Callable[[], st.SearchStrategy[Any]]] = {BlobRef: blob_refs}


@cache
def models(model: type[Model]) -> st.SearchStrategy[Model]:
    """Valid values of a pydantic model, every field drawn."""
    return st.builds(
        model, **{name: values(field.annotation, field.metadata) for name, field in model.model_fields.items()}
    )


all_messages = st.one_of([models(kind) for kind in get_args(messages.Message)])
