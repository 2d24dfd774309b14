"""A merge as a map over layers: no layer needs another one, so where each is merged is somebody else's business.

A method says what happens to one layer, as a function of a `LayerTask` and nothing else; an engine (`server.engines`)
carries it out here, in other threads, in other processes or on other machines. Both values travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import zero
from server.aggregators.method import LayerReport, Merged, State, Update, by_layer


class Share(NamedTuple):
    """One update's part in one layer.

    Attributes:
        share: of the weight of all that trained the layer; the shares of a layer sum to 1.
        discount: see `method.Update`.
        received: the slice as its device decoded it.
        trained: the same slice after training.
    """

    share: float
    discount: float
    received: Pair
    trained: Pair


@dataclass(frozen=True, eq=False)
class LayerTask:
    """All that the merge of one layer depends on.

    Attributes:
        name: of the layer.
        version: that the merge makes.
        old: its pair in the global adapter.
        tail: what the last merge carried over; None where nothing was.
        shares: by client, sorted.
    """

    name: str
    version: int
    old: Pair
    tail: Pair | None
    shares: tuple[Share, ...]


class LayerResult(NamedTuple):
    """What the merge of one layer gives: its new pair, the new tail (None for a method without one), its report."""

    pair: Pair
    tail: Pair | None
    report: LayerReport


MergeLayer = Callable[[LayerTask], LayerResult]
"""What a method does to one layer. Pure, and a function of a module (or a `partial` of one), so that it can travel."""


class Engine(Protocol):
    """Whoever merges layers; see `server.engines`."""

    def __call__(self, merge: MergeLayer, tasks: Iterable[LayerTask], /) -> Iterator[LayerResult]:
        """The results, in the order of the tasks. Tasks are taken as they can be worked on, not all at once."""


def local(merge: MergeLayer, tasks: Iterable[LayerTask], /) -> Iterator[LayerResult]:
    """The engine that merges one layer after the other, here."""
    return map(merge, tasks)


def merge_layers(state: State, updates: Iterable[Update], merge: MergeLayer, engine: Engine) -> Merged:
    """The merge of all layers that somebody trained; others stay as they are.

    Raises:
        AggregationError: as `method.by_layer`.
    """
    layers, tails, reports = dict(state.adapter), dict(state.tail), {}
    entries = by_layer(state, updates)
    tasks = (_task(state, name, parts) for name, parts in entries.items())
    for name, result in zip(entries, engine(merge, tasks), strict=True):
        layers[name], reports[name] = result.pair, result.report
        tails[name] = zero(result.pair.shape) if result.tail is None else result.tail
    kept = Adapter({name: pair for name, pair in tails.items() if pair.rank})
    return Merged(State(Adapter(layers), kept, state.version + 1), reports)


def _task(state: State, name: str, entries: Iterable[tuple[float, Update]]) -> LayerTask:
    shares = (Share(share, each.discount, each.received[name], each.trained[name]) for share, each in entries)
    return LayerTask(name, state.version + 1, state.adapter[name], state.tail.layers.get(name), tuple(shares))
