"""FedEx-LoRA: devices go on from the mean of the factors, and what that lacks is added beside the base.

    A+ = sum_k p_k A_k,   B+ = sum_k p_k B_k,   S+ = T_{r_s}(S + sum_k p_k B_k A_k - B+ A+)

so that S+ + B+ A+ = S + sum_k p_k B_k A_k, the mean of products, up to what T drops.

Source: Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models",
ACL 2025, arXiv 2410.09432.

Differs from the paper: it adds the residual to the weights, which no quantised base bears, and from which a device that
misses a round diverges for ever. Here it is a frozen adapter S beside the base, compressed to r_s; whoever comes back
reads it whole. What the compression drops is reported, and exact is the merge up to it. Weights are counts of examples.

Cost a layer: that of a sum of R = r_s + sum r_k + r columns, see `edge_runtime.lora.sums`.
"""

from __future__ import annotations

from functools import partial

from edge_runtime.lora.adapter import Pair
from edge_runtime.lora.sums import total
from server.aggregators.beside import RANK, compressed, holding
from server.aggregators.fedit import merge_layer as averaged
from server.aggregators.layers import Engine, LayerResult, LayerTask, local
from server.aggregators.method import Aggregator, LayerReport


def fedex_lora(engine: Engine = local, /, *, beside: int = RANK) -> Aggregator:
    """The mean of factors, and its residual beside the base.

    Args:
        engine: merges the layers.
        beside: rank of the frozen adapter.

    Raises:
        ValueError: a rank below 1.
    """
    merge = partial(merge_layer, beside=beside)
    return holding(merge, engine, beside, exact=True, increments=False, equal_ranks=True, of_factors=True)


def merge_layer(task: LayerTask, *, beside: int) -> LayerResult:
    """New adapter, new frozen adapter and report of one layer.

    Raises:
        AggregationError: an update of another rank.
    """
    rank, plain = min(beside, *task.old.shape), averaged(task)
    terms: list[tuple[float, Pair]] = [(-1.0, plain.pair), *((part.share, part.trained) for part in task.shares)]
    terms += [(1.0, task.tail)] if task.tail else []
    found = total(terms, sum(pair.rank for _, pair in terms), rank, rank, seed=f"{task.version}:{task.name}:sum")
    lost = found.truncated(rank)
    # Relative to what the fleet has learnt and not to the residual alone, of which all may be noise.
    report = LayerReport(len(task.shares), plain.report.norm, lost, lost, found.certificate(rank), found.how, found.why)
    return LayerResult(plain.pair, compressed(found, rank), report)
