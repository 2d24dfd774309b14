"""Exact increments in factored form: the global adapter moves by what devices changed, never by what they hold.

    G+ = G + T + sum_k p_k d_k (B_k A_k - R_k)

R_k is the slice that device k trained, exactly as it decoded it; B_k A_k the same slice after training; p_k its share
of the examples among those who trained the layer; d_k its discount, 1 but for what was trained from an older version;
T what the last merge could not fit into the global rank.

Source: our own; the unbiased form is FedHL's (Peng et al., 2025), which keeps G dense. Differs from it: G stays
factored, devices may hold more than they train, the difference is taken against what was decoded (so a lossy
downlink costs no bias), and the truncated tail is carried over.

Why not the mean of absolute products, as FlexLoRA does: a direction that only few devices can train would shrink in
every round, even in one where nobody learns anything (rank collapse).

Cost for a layer of (d_out, d_in): that of a sum of R = r_g + r_tail + sum r_k columns, see `edge_runtime.lora.sums`.
The slices R_k add r_g at most, for they share their directions, and none where the downlink loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from edge_runtime.lora.adapter import Pair
from edge_runtime.lora.algebra import refill, to_pair
from edge_runtime.lora.columns import Term, distinct
from edge_runtime.lora.sums import total
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

TAIL = 1.0
"""Directions kept in the tail, as a multiple of the global rank. What is beyond is lost, and reported."""


def increment(*, tail: float = TAIL) -> Aggregator:
    """The default method.

    Args:
        tail: rank of the carried tail as a multiple of the global rank; 0 carries nothing.

    Raises:
        ValueError: a negative tail.
    """
    if tail < 0:
        raise ValueError(f"aggregator.tail must be 0 or more; found {tail}")

    def combine(state: State, updates: Iterable[Update]) -> Merged:
        layers = by_layer(state, updates)
        return assembled(state, ((name, *_merge(state, name, entries, tail)) for name, entries in layers.items()))

    return Aggregator(fresh_state, combine, prefix, lambda max_rank: 2 * max_rank, hold_more=True, exact=True)


def _merge(
    state: State, name: str, entries: Sequence[tuple[float, Update]], tail: float
) -> tuple[Pair, Pair, LayerReport]:
    """New global pair, new tail and report of one layer."""
    old = state.adapter[name]
    rank, keep = old.rank, old.rank + round(tail * old.rank)
    before = distinct(_before(state, name, old, entries))
    counts = [update.trained.rank_of(name) for _, update in entries]
    found = total(
        _terms(before, name, entries),
        sum(counts) + (before[1].rank if before else 0),
        rank,
        keep,
        seed=f"{state.version + 1}:{name}:sum",
    )
    held = found.spectrum.numerical_rank
    merged, stop = to_pair(found.spectrum, 0, min(rank, held)), min(held, keep)
    report = LayerReport(
        updates=len(entries),
        norm=found.norm,
        truncated=found.truncated(rank),
        lost=found.truncated(max(stop, rank)),
        bound=found.certificate(rank),
        how=found.how,
        why=found.why,
    )
    # Fresh directions must differ from those of other versions, or a direction that taught nothing would come back.
    return refill(merged, rank, f"{state.version + 1}:{name}"), to_pair(found.spectrum, rank, stop), report


def _before(
    state: State, name: str, old: Pair, entries: Sequence[tuple[float, Update]]
) -> Iterator[tuple[float, Pair]]:
    """What is there without this round, less what devices had received of it."""
    yield 1.0, old
    if name in state.tail:
        yield 1.0, state.tail[name]
    for share, update in entries:
        yield -share * update.discount, update.received[name]


def _terms(before: Term | None, name: str, entries: Sequence[tuple[float, Update]]) -> Iterator[Term]:
    if before is not None:
        yield before
    for share, update in entries:
        yield share * update.discount, update.trained[name]
