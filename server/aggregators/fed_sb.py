"""Fed-SB on LoRA-XS cores: of each layer an r x r core is trained, and the mean of cores is exact.

    W_k = W + B R_k A,   R+ = R + sum_k p_k d_k (R_k - R)   over common bases B and A

A device of rank r_k < r trains the first r_k directions of the core, and the others stay what they are; all of them
count with their shares. p_k is the share of the examples among those who trained the layer, d_k a discount.

Source: Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
Federated LoRA Fine-Tuning", arXiv 2502.15436; the core is that of LoRA-XS (Bałazy et al., arXiv 2405.17604).

Differs from the papers: the bases are drawn and not computed from weights or gradients, so that devices of any
precision have the same ones and none travels (`edge_runtime.train.cores`). R = b a, where `a` is a square of orthogonal
rows that never changes and `b` is trained: any core can be written so. Devices of smaller rank train columns of `b`.

What it costs: the model never leaves the space between the bases, r² numbers of a layer, which wants a much larger r.
Every device must hold both bases; plans count them as if they were trained. The server's own adapter is of cores: it is
exported by devices, which have the bases.

Cost: O(devices x r²) a layer.
"""

from __future__ import annotations

import numpy as np

from edge_runtime.lora.adapter import Pair
from edge_runtime.lora.algebra import norm
from server.aggregators.layers import Engine, LayerResult, LayerTask, averaging, local
from server.aggregators.method import Aggregator, Asks, LayerReport


def fed_sb(engine: Engine = local, /) -> Aggregator:
    """The exact mean of cores; `engine` merges the layers."""
    return averaging(
        merge_layer, engine, exact=True, of_factors=True, core=True, asks=lambda _number: Asks(trained="b", sent="b")
    )


def merge_layer(task: LayerTask) -> LayerResult:
    """New global pair and report of one layer."""
    b = task.old.b.astype(np.float64)
    for part in task.shares:
        moved = part.trained.b.astype(np.float64) - part.received.b
        b[:, : part.rank] += part.share * part.discount * moved
    merged = Pair(task.old.a, b.astype(np.float32))
    return LayerResult(merged, None, LayerReport(len(task.shares), norm(merged), 0.0, 0.0))
