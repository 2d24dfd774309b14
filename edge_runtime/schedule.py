"""How the learning rate moves through a round, and how it falls from round to round."""

from __future__ import annotations

import math
from collections.abc import Callable

# The share of the learning rate that is left, by the share of the way that is done, in [0, 1).
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


AFTERWARDS = 0.125
"""Share of the rate for what a device trains for itself, in a fleet whose rate falls. Measured: docs/benchmarks.md."""


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


def rate_in(round_number: int, *, rounds: int, schedule: str) -> float:
    """The share of the fleet's learning rate in a round: all of it in the first one. Never zero.

    Args:
        round_number: counted from 1; a round beyond the last one has the share of the last one.
        rounds: of the fleet.
        schedule: a name in SCHEDULES.
    """
    return SCHEDULES[schedule]((min(max(round_number, 1), rounds) - 1) / rounds)


def rate_afterwards(schedule: str) -> float:
    """The share of the fleet's learning rate for personal adapters, where nobody says another.

    A rate that falls over the rounds may begin so high that at all of it personal steps undo what the fleet learnt.

    Args:
        schedule: over the rounds, a name in SCHEDULES.
    """
    return 1.0 if schedule == "constant" else AFTERWARDS
