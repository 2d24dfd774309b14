"""FLoRIST: FLoRA, but of each round's stack only the fewest directions that hold a share tau of its energy.

    W_t = sum_k p_k d_k (B_k A_k - R_k) = U S Vᵀ,   p = min{p: sum_{i <= p} s_i² >= tau sum_i s_i²}

    S+ = T_{r_s}(S + U_p S_p V_pᵀ),   then A ~ new, B = 0

Source: Ramesh and Dass, "FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large
Language Models", MLSys 2026, arXiv 2506.09199.

Differs from the paper: the base is quantised, so what it merges into the weights is added to a frozen adapter S beside
them, as in `flora`; there the threshold saves no bytes, for S has the same rank in each round. Thin QR takes the place
of the two thin SVDs.

Bias: of each round's change it drops what lies beyond p, and reports it.

Cost a layer: two sums, of sum r_k and of r_s + p columns, see `edge_runtime.lora.sums`.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from edge_runtime.lora.adapter import Pair
from edge_runtime.lora.algebra import to_pair
from edge_runtime.lora.sums import total
from server.aggregators.beside import RANK, compressed, holding
from server.aggregators.flora import anew, learnt
from server.aggregators.layers import Engine, LayerResult, LayerTask, local
from server.aggregators.method import Aggregator, LayerReport

TAU = 0.99


def florist(engine: Engine = local, /, *, beside: int = RANK, tau: float = TAU) -> Aggregator:
    """Thresholded stacking.

    Args:
        engine: merges the layers.
        beside: rank of the frozen adapter.
        tau: share of the energy of a round's change that is kept.

    Raises:
        ValueError: a rank below 1, or a tau outside (0, 1].
    """
    if not 0 < tau <= 1:
        raise ValueError(f"aggregator.tau must be above 0 and at most 1; found {tau}")
    merge = partial(merge_layer, beside=beside, tau=tau)
    return holding(merge, engine, beside, exact=False, increments=True)


def merge_layer(task: LayerTask, *, beside: int, tau: float) -> LayerResult:
    """New adapter, new frozen adapter and report of one layer."""
    rank, seed = min(beside, *task.old.shape), f"{task.version}:{task.name}"
    terms = list(learnt(task))
    count = sum(pair.rank for _, pair in terms)
    change = total(terms, count, count, count, seed=f"{seed}:change")
    energy = np.cumsum(change.spectrum.s**2)
    kept = int(np.searchsorted(energy, tau * energy[-1])) + 1 if energy.size and energy[-1] else 0
    parts: list[tuple[float, Pair]] = [(1.0, to_pair(change.spectrum, 0, kept)), (1.0, task.old)]
    parts += [(1.0, task.tail)] if task.tail else []
    found = total(parts, sum(pair.rank for _, pair in parts), rank, rank, seed=f"{seed}:sum")
    lost = float(np.hypot(change.truncated(kept), found.truncated(rank)))
    bound = change.certificate(kept) + found.certificate(rank)
    report = LayerReport(len(task.shares), found.norm, lost, lost, bound, found.how, f"{kept} directions of the change")
    return LayerResult(anew(task), compressed(found, rank), report)
