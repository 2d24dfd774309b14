"""A merge as a map over layers: no layer needs another one, so where each is merged is somebody else's business.

A method says what happens to one layer, as a function of a `LayerTask` and nothing else; an engine (`server.engines`)
carries it out here, in other threads, in other processes or on other machines. Both values travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.dense import is_dense
from server.aggregators.dense import merge_rows
from server.aggregators.method import (
    Aggregator,
    LayerReport,
    Merged,
    State,
    Update,
    assembled,
    by_layer,
    fresh_state,
    prefix,
)


@dataclass(frozen=True, eq=False)
class Share:
    """One update's part in one layer. Its factors are read when they are asked for: all of them may be too many.

    Attributes:
        layer: its name.
        share: of the weight of all that trained the layer; the shares of a layer sum to 1.
        discount: see `method.Update`.
        before: what its device received.
        after: the same after training.
    """

    layer: str
    share: float
    discount: float
    before: Adapter
    after: Adapter

    @property
    def rank(self) -> int:
        """Directions of the slice."""
        return self.after.rank_of(self.layer)

    @property
    def received(self) -> Pair:
        """The slice as its device decoded it."""
        return self.before[self.layer]

    @property
    def trained(self) -> Pair:
        """The same slice after training."""
        return self.after[self.layer]

    def __reduce__(self) -> tuple[type[Share], tuple[str, float, float, Adapter, Adapter]]:
        # Whoever works elsewhere needs this layer, and cannot read this process's files.
        before, after = Adapter({self.layer: self.received}), Adapter({self.layer: self.trained})
        return Share, (self.layer, self.share, self.discount, before, after)


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


def averaging(merge: MergeLayer, engine: Engine, *, exact: bool, **facts: Any) -> Aggregator:
    """A method that averages whatever devices hold: they hold what they train, and it has no tail.

    Args:
        merge: what it does to a layer.
        engine: carries that out.
        exact: see `method.Aggregator`.
        facts: likewise.
    """

    def combine(state: State, updates: Iterable[Update]) -> Merged:
        return merge_layers(state, updates, merge, engine)

    return Aggregator(
        fresh_state, combine, prefix, lambda max_rank: max_rank,
        hold_more=False, exact=exact, increments=False, **facts,
    )  # fmt: skip


def merge_layers(state: State, updates: Iterable[Update], merge: MergeLayer, engine: Engine) -> Merged:
    """The merge of all layers that somebody trained; others stay as they are. Dense tensors are merged by rows.

    Raises:
        AggregationError: as `method.by_layer`.
    """
    entries = by_layer(state, updates)
    tasks = (_task(state, name, parts) for name, parts in entries.items())
    results = zip(entries, engine(partial(_by_kind, merge), tasks), strict=True)
    return assembled(state, ((name, *result) for name, result in results))


def _by_kind(merge: MergeLayer, task: LayerTask) -> LayerResult:
    if not is_dense(task.name):
        return merge(task)
    parts = ((part.share, part.discount, part.received, part.trained) for part in task.shares)
    pair, report = merge_rows(task.old, task.tail, parts)
    return LayerResult(pair, None, report)


def _task(state: State, name: str, entries: Iterable[tuple[float, Update]]) -> LayerTask:
    shares = (Share(name, share, each.discount, each.received, each.trained) for share, each in entries)
    tail = state.tail.get(name)
    return LayerTask(name, state.version + 1, state.adapter[name], tail, tuple(shares))
