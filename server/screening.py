"""Updates that nobody should merge: a change so large that it can only be an accident or an attack. Pure.

How far an update moves the model is the Frobenius norm of the change of its products, ‖B'A' - BA‖ over all layers
together, in factored form. Honest devices of a round differ by small factors; one at twenty times the median of the
others outweighs all of them. The median of what was accepted in this round and the one before is a yardstick that a
minority cannot move (Yin et al., ICML 2018); with fewer than three updates there is none yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import median

import numpy as np

from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import distance

ENOUGH = 3
"""Accepted updates that make a yardstick."""


@dataclass(frozen=True)
class Limits:
    """What the fleet's file says; see `edge_runtime.config.Server`.

    Attributes:
        ratio: an update may move this many times as far as the median.
        norm: an update may move this far; None for no such limit.
    """

    ratio: float
    norm: float | None = None


def moved(received: Adapter, trained: Adapter) -> float:
    """How far an update moves the model; both adapters have the same layers and ranks.

    Where a slice has no `b`, before and after, because devices keep it for themselves, it is how far `a` moves.
    """
    return sqrt(sum(_moved(pair, trained[name]) ** 2 for name, pair in received.items()))


def _moved(before: Pair, after: Pair) -> float:
    if before.b.any() or after.b.any() or not before.a.any():
        return distance(after, before)
    return float(np.linalg.norm(after.a.astype(np.float64) - before.a))


def absurd(norm: float, accepted: Sequence[float], limits: Limits) -> str:
    """Why an update of that norm is refused, or ''.

    Args:
        norm: how far it moves the model.
        accepted: norms of the updates accepted so far, of this round and the last.
        limits: what is too far.
    """
    if not isfinite(norm):
        return "the change is not finite; lower the learning rate"
    if limits.norm is not None and norm > limits.norm:
        return (
            f"the change has norm {norm:.3g}, and this fleet takes up to {limits.norm:.3g}; "
            "lower the learning rate, or raise [server] max_update_norm"
        )
    usual = median(accepted) if len(accepted) >= ENOUGH else 0.0
    if usual > 0 and norm > limits.ratio * usual:
        return (
            f"the change has norm {norm:.3g}, more than {limits.ratio:g} times the usual {usual:.3g}; "
            "check data and learning rate, or raise [server] max_norm_ratio"
        )
    return ""
