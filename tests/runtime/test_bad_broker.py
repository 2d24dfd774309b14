"""Correctness depends on none of a broker's virtues: over the worst one, a fleet comes to the same bytes."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import cast

import pytest

from edge_runtime.wire.memory import MemoryBroker
from tests.runtime.bad_broker import BadBroker
from tests.runtime.fleets import BRISK, check_undisturbed, fleet_in, in_memory
from tests.runtime.turns import Fleet

PATIENT = ("rounds.progress_timeout=40", "rounds.quorum=1.0")
"""Nobody is given up; when nothing moves, the directive is said again, for the broker may have lost it."""


def live(folder: Path, seed: int, *, seconds: int = 250) -> tuple[Fleet, BadBroker]:
    """A fleet on a bad broker, for that long with lost links, restarts and kills of either side as well."""
    broker, draw = BadBroker(seed), random.Random(seed)
    fleet = fleet_in(folder, "bad", *BRISK, *PATIENT, broker=cast("MemoryBroker", broker))
    fleet.with_will = False
    for _ in range(seconds):
        if fleet.seats["server"].ended:
            break  # what a broker forgets now, nobody is there to say again
        broker.look_away()
        for transport in fleet.transports.values():
            if transport.connected and draw.random() < 0.03:
                transport.drop(with_will=False)
            elif not transport.connected and draw.random() < 0.3:
                transport.resume()
        if draw.random() < 0.04:
            broker.restart(forget=draw.random() < 0.2)
        if draw.random() < 0.05:
            victim = draw.choice(list(fleet.seats.values()))
            victim.fuse.at = len(victim.fuse.seen) + draw.randint(1, 5)
        fleet.sweep()
    for transport in fleet.transports.values():
        transport.resume()
    return fleet.run(), broker


@pytest.mark.parametrize("seed", range(16))
def test_over_the_worst_broker_a_fleet_comes_to_the_same_bytes(folder: Path, seed: int) -> None:
    """And so has merged every update once: nothing else has these bytes."""
    fleet, _ = live(folder, seed)
    check_undisturbed(fleet)


@pytest.mark.parametrize("seed", range(24, 36))
def test_what_overtakes_and_repeats_holds_up_nobody(folder: Path, seed: int) -> None:
    """No message is lost here, so nothing has to wait until a stalled round is announced again."""
    fleet = fleet_in(folder, "muddled", *BRISK, broker=cast("MemoryBroker", BadBroker(seed)))
    check_undisturbed(fleet.run(sweeps=400))


@pytest.mark.slow
def test_over_the_worst_broker_three_hundred_fleets_come_to_the_same_bytes() -> None:
    vices: Counter[str] = Counter()
    for seed in range(100, 400):
        with in_memory() as place:
            fleet, broker = live(place, seed)
            check_undisturbed(fleet)
            vices += Counter(broker.vices)
    assert len(vices) >= 6, "every vice has been lived through"
