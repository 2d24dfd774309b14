"""Whom a round asks, and whom instead of those that went away: by hash, see `edge_runtime.wire.sampling`. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from edge_runtime.config import Rounds
from edge_runtime.wire.messages import Sample
from edge_runtime.wire.sampling import FULL, number_of
from server.policy import Policy
from server.state import State, asks

NAMED = 8
"""Devices that a note names, at most."""


def threshold(names: Iterable[str], count: int, *, seed: int, round_number: int) -> int:
    """The threshold that asks so many of these devices, those with the lowest numbers; 0 if there are none.

    Two devices with the same number, one in some 10¹⁴ pairs, are both asked.
    """
    numbers = sorted(number_of(seed, round_number, name) for name in names)[:count]
    return numbers[-1] + 1 if numbers else 0


def sampled(state: State, round_number: int, policy: Policy) -> tuple[Sample, int]:
    """Whom a round asks, and how many of their updates suffice; 0 for all.

    It asks the fraction of the devices that are here, and more by `over_select`; a round that asks all of them asks
    whoever comes later as well. At least one is asked, if anybody is here.
    """
    here = [name for name, member in state.members.items() if member.online and member.ended is None]
    wanted = math.ceil(policy.fraction_train * len(here))
    share = min(1.0, policy.fraction_train * policy.over_select)
    asked = math.ceil(share * len(here))
    below = FULL if share == 1.0 else threshold(here, asked, seed=policy.seed, round_number=round_number)
    return Sample(seed=policy.seed, below=below), wanted if wanted < asked else 0


def first_needed(rounds: Rounds) -> int:
    """How many updates the first round of the smallest fleet is closed by; see `sampled`."""
    if rounds.buffer_size is not None:
        return rounds.buffer_size
    asked = max(1, math.ceil(rounds.fraction_train * rounds.min_available_nodes))
    return asked if rounds.mode == "synchronous" else math.ceil(asked / 2)


def others(state: State, gone: int, fraction: float) -> tuple[Sample, list[str]]:
    """The sample that asks so many devices more, of those that are here, and their names: the next by number.

    Of a round that asks nobody any more, because what they sent was refused, it is the fraction of the others.
    """
    spare = [
        name
        for name, member in state.members.items()
        if member.online and member.ended is None and not asks(state, name, state.round)
    ]
    count = gone if state.tally.asked else math.ceil(fraction * len(spare))
    if not count or not spare:
        return state.sample, []
    below = threshold(spare, count, seed=state.sample.seed, round_number=state.round)
    sample = state.sample.model_copy(update={"below": below})
    wider = state.model_copy(update={"sample": sample})
    return sample, sorted(name for name in spare if asks(wider, name, state.round))


def named(names: Sequence[str]) -> str:
    """A few of these devices by name, and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
