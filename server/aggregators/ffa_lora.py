"""FFA-LoRA: `a` stays as it was drawn, for ever and for all; `b` is trained and averaged.

    A+ = A_0,   B+ = sum_k p_k B_k,   so that   B+ A+ = sum_k p_k B_k A_0   exactly

Source: Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, arXiv 2403.12313.

Differs from the paper: the rows of A_0 are orthonormal times the norm of the usual initialisation; the paper finds
orthonormal rows slightly better than independent ones.

What it costs: the global adapter never leaves the row space of A_0. It wants a larger learning rate than methods that
train both factors. Half of FedIT's bytes, both ways: A_0 is fetched once, for its blob never changes.
"""

from __future__ import annotations

from server.aggregators.fedit import mean_of_factors
from server.aggregators.layers import Engine, local
from server.aggregators.method import Aggregator, Asks


def ffa_lora(engine: Engine = local, /) -> Aggregator:
    """The exact mean over a common `a`; `engine` merges the layers."""
    return mean_of_factors(engine, lambda _number: Asks(trained="b", sent="b"), exact=True)
