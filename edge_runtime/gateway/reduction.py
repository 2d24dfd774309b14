"""What the updates of a subtree come to: one increment of each layer, and what of it is owed. Pure.

    increment = sum_k (n_k / N) (B_k A_k - R_k) + owed / N, cut to a rank; N = sum_k n_k of those who trained the layer

It is the method of the subtree, merging into a global adapter of zero: rules that a method is composed with, engines
and reports are the same. The fleet above weighs the increment by N, so each device counts there for what it would count
without a gateway in between, and what the cut dropped is exactly the difference.

What the cut and the codec drop is owed: it is kept as a sum over examples, N times the mean, so that it counts the same
when the next round has other weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import cut, decompose, norm, scale, to_pair, zero
from edge_runtime.wire import codec
from edge_runtime.wire.update import Terms, pack
from server.aggregators.method import Aggregator, Merged, State, Update


@dataclass(frozen=True, eq=False)
class Reduced:
    """One increment in the place of many updates.

    Attributes:
        increment: of each layer that somebody trained, the pair whose product is the weighted mean change.
        weights: layer → examples that it stands for.
        merged: its reports; `merged.state.tail` is what did not fit into the rank.
    """

    increment: Adapter
    weights: Mapping[str, float]
    merged: Merged


def reduce(method: Aggregator, updates: Iterable[Update], owed: Adapter, *, rank: int, version: int) -> Reduced:
    """The increment of a round.

    Args:
        method: of the subtree; one that takes increments.
        updates: of the round.
        owed: what former rounds owe, times their examples.
        rank: of the increment, at most.
        version: that the updates were trained from; names draws.

    Raises:
        AggregationError: updates that do not fit together, or none.
    """
    known = sorted(updates, key=lambda update: update.client)
    shapes = {name: pair.shape for update in known for name, pair in update.trained.items()}
    nothing = Adapter({name: zero(shape, min(rank, *shape)) for name, shape in shapes.items()})

    def combined(weights: Mapping[str, float]) -> Merged:
        tail = Adapter({name: scale(pair, 1.0 / weights[name]) for name, pair in owed.items() if name in weights})
        return method.combine(State(nothing, tail, version), known)

    weights = _weights(known)
    merged = combined(weights)
    if merged.excluded:
        # Whoever a rule left out has no part in the sum and gives it no weight, and what is owed is spread over the
        # others. A rule looks at updates alone, so it leaves out the same ones again.
        weights |= _weights([update for update in known if update.client not in merged.excluded])
        merged = combined(weights) if owed else merged
    found = Adapter({name: _used(merged.state.adapter[name]) for name in merged.layers})
    return Reduced(found, {name: weights[name] for name in found}, merged)


def _weights(updates: Sequence[Update]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for update in updates:
        for name in update.trained:
            weights[name] = weights.get(name, 0.0) + update.weight_of(name)
    return weights


@dataclass(frozen=True, eq=False)
class Made:
    """An increment that is ready to travel.

    Attributes:
        payload: the blob.
        owed: what is owed once it was accepted, times the examples.
        how: the codec, for people.
    """

    payload: bytes
    owed: Adapter
    how: str


def make(found: Reduced, owed: Adapter, terms: Terms, *, rank: int) -> Made:
    """The blob of an increment, by the terms of the fleet above.

    Args:
        found: the sum.
        owed: what was owed before.
        terms: what is asked for. Without error feedback only what the rank cut off is owed.
        rank: directions owed of each layer, at most.

    Raises:
        WireError: a number that the codec cannot.
    """
    nothing = Adapter({name: zero(pair.shape, pair.rank) for name, pair in found.increment.items()})
    payload, how = pack(found.increment, nothing, terms)
    sent = codec.decode(payload) if terms.error_feedback else found.increment
    return Made(payload, owing(found, sent, owed, rank=rank), how)


def owing(reduced: Reduced, sent: Adapter, owed: Adapter, *, rank: int) -> Adapter:
    """What is owed after `sent` arrived in the place of the sum, times the examples.

    Args:
        reduced: the sum.
        sent: what the increment decodes to.
        owed: what was owed before; layers that nobody trained this time owe it still.
        rank: directions kept of each layer, at most.
    """
    left = {name: pair for name, pair in owed.items() if name not in reduced.increment}
    for name, pair in reduced.increment.items():
        terms = [(1.0, pair), (-1.0, sent[name])]
        if name in reduced.merged.state.tail:
            terms.append((1.0, reduced.merged.state.tail[name]))
        spectrum = decompose(terms)
        # Below float32's noise on the increment there is nothing that could be sent.
        floor = norm(pair) * np.finfo(np.float32).eps
        kept = min(rank, int(np.count_nonzero(spectrum.s > floor)))
        if kept:
            left[name] = scale(to_pair(spectrum, 0, kept), reduced.weights[name])
    return Adapter(left)


def _used(pair: Pair) -> Pair:
    """The directions that change anything; one of them, if none does."""
    used = np.flatnonzero(np.any(pair.b != 0, axis=0))
    return cut(pair, int(used[-1]) + 1 if used.size else 1)
