"""Whole fleets over the broker in memory: no crash and no loss changes a byte of the result."""

from __future__ import annotations

import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.fleets import BRISK, GOAL, OWING, PAIR, calm, check_undisturbed, fleet_in, in_memory
from tests.runtime.toy import ToyTrainer
from tests.runtime.turns import Fleet

# ── crashes ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("who", ["server", "a"])
def test_a_kill_at_any_point_changes_nothing(folder: Path, who: str, part: int) -> None:
    """Before each single thing that a participant writes, publishes, acknowledges or trains; every fourth a test."""
    _, _, operations = calm()
    for at in range(1 + part, operations[who] + 1, 4):
        fleet = fleet_in(folder, f"{who}-{at}", *BRISK, fuses={who: [at]})
        # A last will may or may not be out before the next life begins.
        fleet.with_will = bool(at % 8 < 4)
        fleet.run()
        assert len(fleet.kills) == 1
        check_undisturbed(fleet)
        shutil.rmtree(fleet.folder)


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("who", ["server", "a"])
def test_a_kill_at_any_point_neither_loses_nor_doubles_what_the_codec_owes(folder: Path, who: str, part: int) -> None:
    _, _, operations = calm(OWING)
    for at in range(1 + part, operations[who] + 1, 4):
        fleet = fleet_in(folder, f"{who}-{at}", *OWING, fuses={who: [at]}).run()
        assert len(fleet.kills) == 1
        check_undisturbed(fleet, OWING)
        shutil.rmtree(fleet.folder)


def test_what_is_owed_is_paid(folder: Path) -> None:
    """With feedback the fleet ends nearer to where it would be without any loss, and owes what is still missing."""
    exact = fleet_in(folder, "exact", *OWING, "wire.codec_up=fp32").run().merged()
    off = {}
    for feedback in ("true", "false"):
        fleet = fleet_in(
            folder, f"feedback-{feedback}", *OWING, "rounds.num_rounds=3", f"wire.error_feedback={feedback}"
        )
        found = fleet.run().merged()
        off[feedback] = sum(float(np.sum((found[name].product() - exact[name].product()) ** 2)) for name in exact)
    assert off["true"] < off["false"]


@settings(max_examples=15, deadline=None)
@given(st.fixed_dictionaries({who: st.lists(st.integers(1, 60), max_size=3) for who in ("server", "a", "b")}))
def test_kills_of_everybody_again_and_again_change_nothing(fuses: dict[str, list[int]]) -> None:
    with in_memory() as place:
        check_undisturbed(fleet_in(place, "killed", *BRISK, fuses=fuses).run())


def test_a_device_that_was_killed_while_it_trained_trains_again_and_one_that_was_not_does_not(folder: Path) -> None:
    for operation, times in (("put_outbox", 2), ("settle", 1)):
        fleet = fleet_in(folder, operation, *BRISK)
        fleet.seats["a"].fuse.before = operation
        fleet.run()
        assert [number for life in fleet.trainers["a"] for number in life.rounds].count(1) == times
        check_undisturbed(fleet)


# ── links and brokers ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("every", [1, 2, 5])
def test_messages_that_come_twice_change_nothing(folder: Path, every: int) -> None:
    check_undisturbed(fleet_in(folder, "twice", *BRISK, stutter=every).run())


def storm(fleet: Fleet, draw: random.Random, *, with_will: bool) -> None:
    """A second of bad weather: links are cut and made anew, the broker restarts and may forget everything."""
    for transport in fleet.transports.values():
        if transport.connected and draw.random() < 0.06:
            transport.drop(with_will=with_will)
        elif not transport.connected and draw.random() < 0.3:
            transport.resume()
    if draw.random() < 0.03:
        fleet.broker.restart(forget=draw.random() < 0.5)
    if draw.random() < 0.03:
        victim = draw.choice(list(fleet.seats.values()))
        victim.fuse.at = len(victim.fuse.seen) + draw.randint(1, 4)


def weather(fleet: Fleet, seed: int, *, with_will: bool, seconds: int = 300) -> Fleet:
    """A storm of that many seconds, or until the server has ended, and then calm."""
    draw = random.Random(seed)
    for _ in range(seconds):
        if fleet.seats["server"].ended:
            break  # what a broker forgets now, nobody is there to say again
        storm(fleet, draw, with_will=with_will)
        fleet.sweep()
    for transport in fleet.transports.values():
        transport.resume()
    return fleet.run()


@pytest.mark.parametrize("seed", range(12))
def test_lost_links_forgetful_brokers_and_kills_change_nothing(folder: Path, seed: int) -> None:
    """As long as the same devices take part: no last will is seen, so everybody is waited for."""
    fleet = fleet_in(folder, "storm", *BRISK, "rounds.progress_timeout=500", stutter=seed % 3 * 2)
    fleet.with_will = False
    check_undisturbed(weather(fleet, seed, with_will=False))


@pytest.mark.parametrize("seed", range(8))
def test_a_fleet_that_sees_devices_come_and_go_finishes_with_what_it_stored(folder: Path, seed: int) -> None:
    """Last wills change who is asked, so versions may differ; that every stored update is merged once may not."""
    fleet = fleet_in(
        folder, "storm", *BRISK, "rounds.num_rounds=4", "rounds.progress_timeout=60", "rounds.min_available_nodes=3",
        devices={**PAIR, "c": partial(ToyTrainer, GOAL, rank=8)},
    )  # fmt: skip
    weather(fleet, seed, with_will=True)
    assert fleet.state is not None
    assert (fleet.state.phase, fleet.state.version) == ("over", 4)
    merges = dict(fleet.merges())
    assert sorted(merges) == [1, 2, 3, 4]
    for number, updates in merges.items():
        known = [record for record in fleet.records if record["event"] == "update" and record["round"] == number]
        assert 1 <= updates <= len({record["client"] for record in known})
    assert set(fleet.delivered) == set("abc")


def test_a_broker_that_forgets_everything_in_the_middle_costs_seconds_only(folder: Path) -> None:
    for moment in range(5, 60, 9):
        fleet = fleet_in(folder, f"forget-{moment}", *BRISK, "rounds.progress_timeout=60")
        for _ in range(moment):
            fleet.sweep()
        fleet.broker.restart(forget=True)
        # The one thing that nobody says again is a device's last report: then the server waits for the timeout.
        check_undisturbed(fleet.run(sweeps=200))
