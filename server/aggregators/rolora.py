"""RoLoRA: rounds take turns. In odd ones `b` is trained and averaged and `a` stays, in even ones the other way round.

    odd:  A+ = A,  B+ = sum_k p_k B_k      even:  A+ = sum_k p_k A_k,  B+ = B

In every round one factor is common to all devices, so each merge is the exact mean of products.

Source: Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", NeurIPS 2025, arXiv
2502.01755.

Differs from the paper: nothing. Half of FedIT's bytes, both ways: of a version, the factor that the round before left
as it was is a blob that devices have already.
"""

from __future__ import annotations

from server.aggregators.fedit import mean_of_factors
from server.aggregators.layers import Engine, local
from server.aggregators.method import Aggregator, Asks


def rolora(engine: Engine = local, /) -> Aggregator:
    """The exact mean of one factor at a time; `engine` merges the layers."""
    return mean_of_factors(engine, asks, exact=True)


def asks(number: int) -> Asks:
    """What a round asks for; the first one trains `b`, for with b = 0 there is nothing to learn in `a`."""
    return Asks(trained="b", sent="b") if number % 2 else Asks(trained="a", sent="a")
