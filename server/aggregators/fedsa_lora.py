"""FedSA-LoRA: both factors are trained, `a` is shared and averaged, and `b` stays on its device for ever.

    A+ = sum_k p_k A_k,   each device goes on with its own B_k

Source: Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025, arXiv 2410.01463.

Differs from the paper: a device turns its `b` with the shared `a`, if that comes back turned (`lora.rebasing`); where
`a` is what it was, nothing is turned. Devices keep both in their own durable state, with the update of the same round.

What it costs: there is no global model. The server's adapter has b = 0, a device that never trained has nothing to
serve, and losses are those of personal models. A device that was away for some rounds has a `b` for an older `a`. Half
of FedIT's bytes, both ways. Since products of updates are unknown here, their screening looks at `a` alone.
"""

from __future__ import annotations

from server.aggregators.fedit import mean_of_factors
from server.aggregators.layers import Engine, local
from server.aggregators.method import Aggregator, Asks


def fedsa_lora(engine: Engine = local, /) -> Aggregator:
    """The mean of `a` over devices that keep their own `b`; `engine` merges the layers."""
    return mean_of_factors(engine, lambda _number: Asks(trained="ab", sent="a", private="b"), exact=False)
