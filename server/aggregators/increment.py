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

from collections.abc import Iterable, Iterator
from functools import partial

from edge_runtime.lora.adapter import Pair
from edge_runtime.lora.algebra import refill, to_pair
from edge_runtime.lora.columns import Term, distinct
from edge_runtime.lora.sums import total
from server.aggregators.layers import Engine, LayerResult, LayerTask, local, merge_layers
from server.aggregators.method import Aggregator, LayerReport, Merged, State, Update, fresh_state, prefix

TAIL = 1.0
"""Directions kept in the tail, as a multiple of the global rank. What is beyond is lost, and reported."""


def increment(engine: Engine = local, /, *, tail: float = TAIL) -> Aggregator:
    """The default method.

    Args:
        engine: merges the layers.
        tail: rank of the carried tail as a multiple of the global rank; 0 carries nothing.

    Raises:
        ValueError: a negative tail.
    """
    if tail < 0:
        raise ValueError(f"aggregator.tail must be 0 or more; found {tail}")

    def combine(state: State, updates: Iterable[Update]) -> Merged:
        return merge_layers(state, updates, partial(merge_layer, tail=tail), engine)

    return Aggregator(
        fresh_state, combine, prefix, lambda max_rank: 2 * max_rank, hold_more=True, exact=True, increments=True
    )


def merge_layer(task: LayerTask, *, tail: float) -> LayerResult:
    """New global pair, new tail and report of one layer."""
    rank, keep = task.old.rank, task.old.rank + round(tail * task.old.rank)
    before = distinct(_before(task))
    found = total(
        _terms(before, task),
        sum(part.rank for part in task.shares) + (before[1].rank if before else 0),
        rank,
        keep,
        seed=f"{task.version}:{task.name}:sum",
    )
    held = found.spectrum.numerical_rank
    merged, stop = to_pair(found.spectrum, 0, min(rank, held)), min(held, keep)
    report = LayerReport(
        updates=len(task.shares),
        norm=found.norm,
        truncated=found.truncated(rank),
        lost=found.truncated(max(stop, rank)),
        bound=found.certificate(rank),
        how=found.how,
        why=found.why,
    )
    # Fresh directions must differ from those of other versions, or a direction that taught nothing would come back.
    fresh = refill(merged, rank, f"{task.version}:{task.name}")
    return LayerResult(fresh, to_pair(found.spectrum, rank, stop), report)


def _before(task: LayerTask) -> Iterator[tuple[float, Pair]]:
    """What is there without this round, less what devices had received of it."""
    yield 1.0, task.old
    if task.tail is not None:
        yield 1.0, task.tail
    for part in task.shares:
        yield -part.share * part.discount, part.received


def _terms(before: Term | None, task: LayerTask) -> Iterator[Term]:
    if before is not None:
        yield before
    for part in task.shares:
        yield part.share * part.discount, part.trained
