"""What a method is: a record of plain functions with explicit state, and the values they exchange.

A method never sees the wire, a clock or a device's name beyond its sort key. Adding one is one file and one row in
the table of `server/aggregators/__init__.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from edge_runtime.errors import AggregationError
from edge_runtime.lora.adapter import Adapter, Pair, Slot, joined
from edge_runtime.lora.algebra import cut, fresh_rows
from edge_runtime.lora.dense import as_pair, is_dense
from edge_runtime.lora.factors import Factors, Private

Shapes = Mapping[str, tuple[int, int]]
"""Layer name → (d_out, d_in)."""


@dataclass(frozen=True, eq=False)
class Update:
    """What one device returned.

    Attributes:
        client: its name; only sorts the updates, so that their order of arrival leaves no trace.
        weight: training examples really used.
        received: the slice it trained, exactly as it decoded it.
        trained: the same slice after training; same layers, shapes and ranks as `received`.
        weights: examples of each layer, where they are not `weight` for all: of a gateway, behind which devices train
            different layers.
        discount: share of its increment that counts; less than 1 for one that was trained from an older version.
    """

    client: str
    weight: float
    received: Adapter
    trained: Adapter
    weights: Mapping[str, float] = field(default_factory=dict)
    discount: float = 1.0

    def weight_of(self, layer: str) -> float:
        """Training examples that this layer saw."""
        return self.weights.get(layer, self.weight)


def in_memory(adapter: Adapter) -> Adapter:
    """An adapter as it is."""
    return adapter


@dataclass(frozen=True, eq=False)
class State:
    """What a method carries from round to round.

    Attributes:
        adapter: the global adapter; its first r directions are what a device of rank r receives.
        tail: directions that did not fit into `adapter`, added again in the next round; may be empty.
        version: counts merges.
        carried: name → what a part that is composed with the method remembers, such as a server optimiser's moments.
        keep: where the layers of the next state are put, one by one as they are merged, since all may be too many for
            memory. No part of what is saved.
    """

    adapter: Adapter
    tail: Adapter
    version: int
    carried: Mapping[str, Adapter] = field(default_factory=dict)
    keep: Callable[[Adapter], Adapter] = in_memory


@dataclass(frozen=True)
class LayerReport:
    """What a merge cost one layer, in Frobenius norm of products.

    Attributes:
        updates: devices that trained the layer.
        norm: of the merged change.
        truncated: of what did not fit into the global rank (kept as the tail, where the method has one); exact where
            the sum was decomposed exactly, else as random probes show it.
        lost: of what was dropped for good; likewise. What a robust rule drops is counted as the most that it can be.
        bound: what `truncated` does not exceed.
        how: the way in which the sum was decomposed; see `edge_runtime.lora.sums`. Empty where nothing was.
        why: what decided that.
    """

    updates: int
    norm: float
    truncated: float
    lost: float
    bound: float = 0.0
    how: str = ""
    why: str = ""


@dataclass(frozen=True, eq=False)
class Merged:
    """The outcome of one merge.

    Attributes:
        state: the next one.
        layers: layer name → its report.
        excluded: client → why a robust rule left its update out.
        counted: client → share of its change, of the squared norm, that lies among the entries which a rule left after
            trimming; empty where none trimmed.
    """

    state: State
    layers: Mapping[str, LayerReport]
    excluded: Mapping[str, str] = field(default_factory=dict)
    counted: Mapping[str, float] = field(default_factory=dict)

    @property
    def truncation(self) -> float:
        """Relative truncation error of all layers together: ||truncated|| / ||merged||."""
        total = sum(layer.norm**2 for layer in self.layers.values())
        return float(np.sqrt(sum(layer.truncated**2 for layer in self.layers.values()) / total)) if total else 0.0


class Asks(NamedTuple):
    """What a round asks of a device's factors.

    Attributes:
        trained: those that it trains; the others stay as it received them.
        sent: those that it returns.
        private: the one that it keeps for itself, from round to round.
    """

    trained: Factors = "ab"
    sent: Factors = "ab"
    private: Private = ""


def everything(_number: int) -> Asks:
    """Of any round: both factors are trained and sent."""
    return Asks()


class Aggregator(NamedTuple):
    """A method.

    Attributes:
        init: (shapes, rank, seed) → the state before the first round; its product is zero.
        combine: (state, updates) → the next state. Updates are consumed once; their order does not matter.
        fit: (global adapter, slot) → what a device with that slot receives.
        server_rank: largest trained rank → rank of the global adapter, when the fleet's file names none.
        hold_more: whether devices may hold directions that they do not train. Methods that average absolute products
            or factors must see everything that a device holds, so they say no.
        exact: whether the merge equals the weighted mean of products, up to the reported truncation.
        increments: whether an update counts as a change of the product, so that it may be one of no slice in
            particular, such as a gateway's.
        least: fewest updates that a merge takes.
        asks: number of a round, from 1 → what it asks of a device's factors.
        equal_ranks: whether every device must train all of the global adapter's rank.
        of_factors: whether the merge depends on the factors of a product, and not on the product alone.
        weighs: whether an update counts by its weight.
        beside: directions of the frozen adapter that devices hold beside the base; see `beside`.
        core: whether what is trained is an r x r core between two bases that devices draw, r the fleet's largest rank.
        own: directions that a device trains for itself alone, beside those of the fleet.
        slice: the policy by which devices choose what they train; empty where the fleet's file decides.
        training: what its rounds ask of local training beside that, by fields of `edge_runtime.trainer.Training`.
    """

    init: Callable[[Shapes, int, int], State]
    combine: Callable[[State, Iterable[Update]], Merged]
    fit: Callable[[Adapter, Slot], Adapter]
    server_rank: Callable[[int], int]
    hold_more: bool
    exact: bool
    increments: bool
    least: int = 1
    asks: Callable[[int], Asks] = everything
    equal_ranks: bool = False
    of_factors: bool = False
    weighs: bool = True
    beside: int = 0
    core: bool = False
    own: int = 0
    slice: str = ""
    training: Mapping[str, float] = MappingProxyType({})

    @property
    def apart(self) -> bool:
        """Whether the two factors do not travel together in every round."""
        return {self.asks(number) for number in (1, 2)} != {Asks()}

    @property
    def private(self) -> Private:
        """The factor that devices keep for themselves."""
        return self.asks(1).private


def fresh_state(shapes: Shapes, rank: int, seed: int) -> State:
    """A global adapter of zero product at that rank: orthonormal rows of `a`, of the usual norm, and b = 0.

    Dense tensors begin as zeros, and as many of their rows as the rank.
    """
    layers = {}
    for name, (d_out, d_in) in shapes.items():
        if is_dense(name):
            rows = min(rank, d_out)
            layers[name] = as_pair(np.zeros((rows, d_in), np.float32), range(rows), d_out)
            continue
        a = fresh_rows(np.zeros((0, d_in), np.float32), min(rank, d_out, d_in), f"{seed}:0:{name}")
        layers[name] = Pair(a, np.zeros((d_out, a.shape[0]), np.float32))
    return State(Adapter(layers), Adapter({}), 0)


def prefix(adapter: Adapter, slot: Slot) -> Adapter:
    """The first directions of the global adapter, as many as the slot holds in each layer."""
    return Adapter({name: cut(adapter[name], rank) for name, rank in slot.held.items() if name in adapter and rank})


def by_layer(state: State, updates: Iterable[Update]) -> dict[str, list[tuple[float, Update]]]:
    """Updates of each layer with weights that sum to one over those who trained that layer, sorted by client.

    A device that did not train a layer has no say in it.

    Raises:
        AggregationError: no update at all, a weight that is not positive, two updates of one client, or a layer whose
            shape or rank does not fit.
    """
    ordered = sorted(updates, key=lambda update: update.client)
    if not ordered:
        raise AggregationError("a merge needs at least one update; found none; wait for a device")
    for before, after in itertools.pairwise(ordered):
        if before.client == after.client:
            raise AggregationError(f"a device sends one update a round; found two of '{after.client}'")
    layers: dict[str, list[tuple[float, Update]]] = {}
    for update in ordered:
        _check(state, update)
        for name in update.trained:
            layers.setdefault(name, []).append((update.weight_of(name), update))
    for entries in layers.values():
        total = sum(weight for weight, _ in entries)
        entries[:] = [(weight / total, update) for weight, update in entries]
    return layers


def assembled(state: State, results: Iterable[tuple[str, Pair, Pair | None, LayerReport]]) -> Merged:
    """The outcome of a merge, layer by layer; layers of which there is no result stay as they are.

    Args:
        state: of before.
        results: name, new pair, new tail (None for a method that has none) and report of each layer that was merged.
    """
    pairs, tails, reports = [state.adapter], [], {}
    for name, pair, tail, report in results:
        pairs.append(state.keep(Adapter({name: pair})))
        if tail is not None and tail.rank:
            tails.append(state.keep(Adapter({name: tail})))
        reports[name] = report
    left = state.tail.only(name for name in state.tail if name not in reports)
    return Merged(State(joined(pairs), joined([left, *tails]), state.version + 1), reports)


def _check(state: State, update: Update) -> None:
    light = [weight for weight in (update.weight, *update.weights.values()) if not weight > 0]
    if light:
        raise AggregationError(f"'{update.client}' weighs {light[0]}; a weight is a positive count of examples")
    # Sizes alone, so that layers that are still on disk stay there.
    shapes, sent = state.adapter.shapes, update.received.sizes
    for name, (d_out, d_in, rank) in update.trained.sizes.items():
        if name not in shapes or name not in sent:
            raise AggregationError(f"'{update.client}' trained layer '{name}', which the fleet does not have")
        if (d_out, d_in) != shapes[name] or (d_out, d_in, rank) != sent[name]:
            raise AggregationError(
                f"layer '{name}' of '{update.client}': expected {shapes[name]} at rank {sent[name][2]}, "
                f"found {(d_out, d_in)} at rank {rank}; check that the device has the fleet's base model"
            )


def save_state(state: State) -> bytes:
    """A state as safetensors bytes; `load_state` gives it back bit for bit."""
    tensors: dict[str, NDArray[np.generic]] = {
        f"{part}:{name}:{factor}": np.ascontiguousarray(getattr(pair, factor))
        for part, adapter in (("adapter", state.adapter), ("tail", state.tail), *state.carried.items())
        for name, pair in adapter.items()
        for factor in ("a", "b")
    }
    tensors["version"] = np.asarray([state.version], dtype=np.int64)
    payload: bytes = safetensors.numpy.save(tensors)
    return payload


def load_state(payload: bytes) -> State:
    """The state in bytes that `save_state` wrote.

    Raises:
        AggregationError: bytes that are no such state.
    """
    try:
        tensors = safetensors.numpy.load(payload)
        version = int(tensors.pop("version")[0])
        parts: dict[str, dict[str, Pair]] = {"adapter": {}, "tail": {}}
        for key, a in tensors.items():
            part, name, factor = key.split(":")
            if factor == "a":
                parts.setdefault(part, {})[name] = Pair(a, tensors[f"{part}:{name}:b"])
    except (safetensors.SafetensorError, ValueError, KeyError, IndexError) as error:
        raise AggregationError(f"a saved state does not load ({error}); restore the store from a backup") from error
    adapter, tail = Adapter(parts.pop("adapter")), Adapter(parts.pop("tail"))
    return State(adapter, tail, version, {part: Adapter(layers) for part, layers in parts.items()})
