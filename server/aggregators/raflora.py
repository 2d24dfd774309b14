"""raFLoRA: the mean of products, but each direction is averaged over the devices that have it.

    W* = sum_i sum_{k: r_k > i} p_k / P_i  b_ki a_ki,   P_i = sum_{k: r_k > i} p_k,   G+ = T_r(W*)

Source: Wu et al., arXiv 2602.13486, which names rank collapse: under FlexLoRA the energy concentrates in the ranks that
all devices share.

Differs from the paper: it cuts the directions at the ranks of the fleet, and every direction between two cuts has the
same owners, so the sum is the same direction by direction; partial participation then needs no list of the fleet's
ranks. A direction that no device of the round has keeps its value. Rows of `a` have the usual norm, where the paper
gives each factor the root of the singular value; the product is the same.

Bias: no client-weighted objective has this sum as its mean. The few devices of high rank have all the say in the
directions that only they train, and "direction i" means something only as long as training has not turned the slice.

Cost a layer: that of a sum of R = sum r_k columns, see `edge_runtime.lora.sums`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edge_runtime.lora.algebra import refill, take, to_pair
from edge_runtime.lora.columns import Term
from edge_runtime.lora.sums import total
from server.aggregators.layers import Engine, LayerResult, LayerTask, averaging, local
from server.aggregators.method import Aggregator, LayerReport
from server.aggregators.rbla import owners


def raflora(engine: Engine = local, /) -> Aggregator:
    """The mean of products over those who have a direction; `engine` merges the layers."""
    return averaging(merge_layer, engine, exact=False, of_factors=True)


def merge_layer(task: LayerTask) -> LayerResult:
    """New global pair and report of one layer."""
    rank = task.old.rank
    found = total(
        _terms(task), rank + sum(part.rank for part in task.shares), rank, rank, seed=f"{task.version}:{task.name}:sum"
    )
    kept = to_pair(found.spectrum, 0, min(rank, found.spectrum.numerical_rank))
    lost = found.truncated(rank)
    report = LayerReport(len(task.shares), found.norm, lost, lost, found.certificate(rank), found.how, found.why)
    return LayerResult(refill(kept, rank, f"{task.version}:{task.name}"), None, report)


def _terms(task: LayerTask) -> Iterator[Term]:
    owned = owners(task)
    yield 1.0, take(task.old, np.flatnonzero(owned == 0).tolist())
    for part in task.shares:
        yield part.share / owned[: part.rank], part.trained
