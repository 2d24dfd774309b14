"""How the learning rate moves through a round."""

from __future__ import annotations

import math
from collections.abc import Callable

# The share of the learning rate that is left, by the share of the round (after its warm-up) that is done, in [0, 1).
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def rate_at(step: int, *, steps: int, warmup_steps: int, schedule: str) -> float:
    """The share of the largest learning rate at a step, counted from 0: a linear rise, then the schedule. Never zero.

    Args:
        step: counted from 0.
        steps: of the round.
        warmup_steps: over which it rises.
        schedule: a name in SCHEDULES.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return SCHEDULES[schedule]((step - warmup_steps) / max(1, steps - warmup_steps))
