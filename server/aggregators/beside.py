"""A frozen adapter beside the base: what a method would merge into the weights, and must not, for they are quantised.

A state has it under BESIDE, at a rank that never changes: what a merge adds is compressed again, and what that cost is
reported. Devices hold all of it, train none of it, and read it as the first directions of the global adapter; then
follow those that they train. So it needs no place of its own on the wire, nor in the model: held directions are frozen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from edge_runtime.lora.adapter import Adapter, Deferred, Pair
from edge_runtime.lora.algebra import pad, to_pair, zero
from edge_runtime.lora.leading import Leading
from edge_runtime.lora.slices import LAST
from server.aggregators.layers import Engine, MergeLayer, merge_layers
from server.aggregators.method import Aggregator, Merged, Shapes, State, Update, fresh_state, prefix

BESIDE = "beside"
"""What a state carries it as."""
RANK = 32
"""Directions of it, where the fleet's file names no other number."""


def holding(merge: MergeLayer, engine: Engine, beside: int, **facts: Any) -> Aggregator:
    """A method with a frozen adapter; `merge` finds it as the tail of a task, and returns the next one as a tail.

    Args:
        merge: what the method does to a layer.
        engine: carries that out.
        beside: directions of the frozen adapter.
        facts: see `method.Aggregator`.

    Raises:
        ValueError: fewer than one direction.
    """
    if beside < 1:
        raise ValueError(f"aggregator.beside must be at least 1; found {beside}")

    def init(shapes: Shapes, rank: int, seed: int) -> State:
        frozen = Adapter({name: zero(shape, min(beside, *shape)) for name, shape in shapes.items()})
        return replace(fresh_state(shapes, rank, seed), carried={BESIDE: frozen})

    def combine(state: State, updates: Iterable[Update]) -> Merged:
        frozen = state.carried.get(BESIDE, Adapter({}))
        merged = merge_layers(replace(state, tail=frozen, carried={}), updates, merge, engine)
        carried = {BESIDE: merged.state.tail}
        return replace(merged, state=replace(merged.state, tail=Adapter({}), carried=carried))

    return Aggregator(
        init, combine, prefix, lambda max_rank: max_rank, hold_more=False, beside=beside, slice=LAST, **facts
    )


def published(state: State) -> Adapter:
    """What devices read of a state: the frozen adapter, if there is one, and then the global one."""
    frozen = state.carried.get(BESIDE)
    if frozen is None:
        return state.adapter

    def made(name: str) -> Pair:
        first, then = frozen[name], state.adapter[name]
        return Pair(np.concatenate([first.a, then.a]), np.concatenate([first.b, then.b], axis=1))

    if isinstance(state.adapter.layers, Deferred) or isinstance(frozen.layers, Deferred):
        sizes = {n: (d_out, d_in, rank + frozen.rank_of(n)) for n, (d_out, d_in, rank) in state.adapter.sizes.items()}
        return Adapter(Deferred(sizes, made))
    return Adapter({name: made(name) for name in state.adapter})


def compressed(found: Leading, rank: int) -> Pair:
    """The frozen adapter of a layer that a sum becomes: its leading directions, and zeros up to the rank."""
    return pad(to_pair(found.spectrum, 0, min(rank, found.spectrum.numerical_rank)), rank)
