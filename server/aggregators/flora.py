"""FLoRA: what devices learnt is stacked and merged into the base, and every round begins with a new adapter.

    W+ = W + sum_k p_k B_k A_k  (the product of the stacked factors),   then A ~ new, B = 0

The base is quantised, so W + S stands for it: S is a frozen adapter of rank r_s that every device holds beside it.

    S+ = T_{r_s}(S + sum_k p_k d_k (B_k A_k - R_k))

R_k is the product of the slice that device k received, zero but for what a codec makes of it; d_k is its discount.

Source: Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
NeurIPS 2024, arXiv 2409.05976.

Differs from the paper: stacks are compressed to r_s, so that what a device holds does not grow with devices and rounds;
what that drops is reported, and exact is the merge up to it. The new rows of `a` are drawn by the server for all, and
not by each device for itself: in a round, devices then learn in common directions.

What it costs: every round, momentum is lost and the first step moves only `b`, for b = 0. Any device must hold r_s
directions more than it trains. What codecs owe is lost with the slice that it is owed in.

Cost a layer: that of a sum of R = r_s + sum r_k columns, see `edge_runtime.lora.sums`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from edge_runtime.lora.adapter import Matrix, Pair
from edge_runtime.lora.algebra import fresh_rows
from edge_runtime.lora.columns import Term, distinct
from edge_runtime.lora.sums import total
from server.aggregators.beside import RANK, compressed, holding
from server.aggregators.layers import Engine, LayerResult, LayerTask, local
from server.aggregators.method import Aggregator, LayerReport


def flora(engine: Engine = local, /, *, beside: int = RANK) -> Aggregator:
    """Stacking, and a new adapter each round.

    Args:
        engine: merges the layers.
        beside: rank of the frozen adapter.

    Raises:
        ValueError: a rank below 1.
    """
    return holding(partial(merge_layer, beside=beside), engine, beside, exact=True, increments=True)


def merge_layer(task: LayerTask, *, beside: int) -> LayerResult:
    """New adapter, new frozen adapter and report of one layer."""
    rank = min(beside, *task.old.shape)
    terms = list(learnt(task))
    terms += [(1.0, task.old), *([(1.0, task.tail)] if task.tail else [])]
    found = total(terms, sum(pair.rank for _, pair in terms), rank, rank, seed=f"{task.version}:{task.name}:sum")
    lost = found.truncated(rank)
    report = LayerReport(len(task.shares), found.norm, lost, lost, found.certificate(rank), found.how, found.why)
    return LayerResult(anew(task), compressed(found, rank), report)


def learnt(task: LayerTask) -> Iterator[Term]:
    """What devices changed, as terms of a sum."""
    yield from ((part.share * part.discount, part.trained) for part in task.shares)
    before = distinct((-part.share * part.discount, part.received) for part in task.shares)
    if before is not None:
        yield before


def anew(task: LayerTask) -> Pair:
    """The adapter that the next round begins with: new rows of `a`, and b = 0."""
    d_out, d_in = task.old.shape
    nothing: Matrix = np.zeros((0, d_in), np.float32)
    a = fresh_rows(nothing, task.old.rank, f"{task.version}:{task.name}")
    return Pair(a, np.zeros((d_out, task.old.rank), np.float32))
