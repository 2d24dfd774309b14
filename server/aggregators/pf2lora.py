"""PF2LoRA, first-order: an adapter for all and a small one for each device, learnt together; the first is averaged.

    W_k = W + B A + D_k C_k,   A+ = sum_k p_k A_k,   B+ = sum_k p_k B_k,   D_k and C_k stay on device k

Source: Hao et al., "Personalized Federated Fine-tuning for Heterogeneous Data: An Automatic Rank Learning Approach via
Two-Level LoRA", arXiv 2503.03920.

Differs from the paper: there the device's adapter is the lower level of a bilevel problem, and the gradient of A and B
has a term of second order, how the best D and C move with them. Here that term is left out, and both levels take each
step together, on one gradient: hence first-order. Directions of the device's own begin in rows that are the same for
all devices, which matters to none of them.

Bias: that of FedIT. The global model is the first level alone; a device's own effective rank is what its data make of
the `own` directions that it may add.

Cost: that of FedIT, and of `own` more directions to train on a device. They never travel.
"""

from __future__ import annotations

from server.aggregators.fedit import mean_of_factors
from server.aggregators.layers import Engine, local
from server.aggregators.method import Aggregator, everything

OWN = 4


def pf2lora(engine: Engine = local, /, *, own: int = OWN) -> Aggregator:
    """The mean of factors over devices with directions of their own.

    Args:
        engine: merges the layers.
        own: directions of each layer that a device trains for itself alone.

    Raises:
        ValueError: fewer than one.
    """
    if own < 1:
        raise ValueError(f"aggregator.own must be at least 1; found {own}")
    return mean_of_factors(engine, everything, exact=False)._replace(own=own)
