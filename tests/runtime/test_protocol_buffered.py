"""Whole fleets whose rounds do not wait: the same as those that do, where nobody is late; exactly once, in any case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.fleets import BRISK, GOAL, PAIR, Devices, fleet_in, in_memory
from tests.runtime.toy import ToyTrainer, distance
from tests.runtime.turns import Fleet, Seat, fleet_config

BUFFERED = ("rounds.mode=buffered",)
THREE: Devices = {name: partial(ToyTrainer, GOAL, rank=rank) for name, rank in (("a", 2), ("b", 4), ("c", 8))}


class Uneven(Fleet):
    """A fleet in which some devices take a turn only every few sweeps."""

    paces: Mapping[str, int] = {"b": 2, "c": 7}

    def sweep(self) -> None:
        """One turn for whoever has one."""
        number = round(self.clock.now) + 1
        waiting = {name: seat for name, seat in self.seats.items() if number % self.paces.get(name, 1)}
        kept: dict[str, Seat] = dict(self.seats)
        for name in waiting:
            del self.seats[name]
        try:
            super().sweep()
        finally:
            self.seats = {name: self.seats.get(name, seat) for name, seat in kept.items()}


def check_books(fleet: Fleet) -> None:
    """What devices were told is accepted is what was stored, and what was stored is what was merged: each once."""
    stored = [record for record in fleet.records if record["event"] == "update"]
    numbers = {record["n"] for record in stored}
    once = {record["n"]: record for record in stored}
    into = Counter(record["round"] for record in once.values())
    merged = {
        record["round"]: layer["updates"]
        for record in fleet.records
        if record["event"] == "merge"
        for layer in record["layers"].values()
    }
    assert len(numbers) == sum(into.values())
    assert into == merged


@pytest.mark.parametrize("order", ["abc", "cab", "bca"])
def test_a_lockstep_fleet_with_a_buffer_of_all_makes_the_bytes_of_a_synchronous_one(order: str) -> None:
    with in_memory() as folder:
        devices = {name: THREE[name] for name in order}
        settings_of = (*BRISK, "rounds.num_rounds=3", "rounds.min_available_nodes=3")
        waiting = fleet_in(folder, "waiting", *settings_of, devices=THREE).run()
        buffered = fleet_in(folder, "buffered", *settings_of, *BUFFERED, "rounds.buffer_size=3", devices=devices).run()
        assert buffered.merged().digest() == waiting.merged().digest()


def uneven(folder: Path, name: str, *overrides: str, **fuses: list[int]) -> Uneven:
    return Uneven(folder / name, fleet_config(*overrides), THREE, fuses=fuses)


def test_a_fleet_of_unequal_pace_reaches_the_optimum_and_waits_for_nobody(folder: Path) -> None:
    fleet = uneven(
        folder, "uneven", *BUFFERED, "rounds.buffer_size=2", "rounds.num_rounds=40", "rounds.min_available_nodes=3",
        "training.learning_rate=0.4", "training.max_steps=6", "rounds.max_staleness=8",
    ).run(sweeps=20_000)  # fmt: skip
    assert distance(fleet.merged(), GOAL) < 0.05
    ages = [record["age"] for record in fleet.records if record["event"] == "update"]
    assert max(ages) >= 2, "the slow one is behind"
    assert {record["client"] for record in fleet.records if record["event"] == "update" and record["age"]} >= {"c"}
    check_books(fleet)


SETTINGS = (*BRISK, *BUFFERED, "rounds.buffer_size=2", "rounds.num_rounds=4", "rounds.min_available_nodes=3")


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 120), max_size=4),
    st.lists(st.integers(1, 60), max_size=3),
    st.lists(st.integers(1, 60), max_size=3),
)
def test_a_kill_at_any_operation_of_any_participant_loses_and_doubles_nothing(
    server: list[int], a: list[int], c: list[int]
) -> None:
    with in_memory() as folder:
        fleet = uneven(folder, "killed", *SETTINGS, server=server, a=a, c=c).run(sweeps=20_000)
        check_books(fleet)
        assert fleet.state is not None
        assert (fleet.state.phase, fleet.state.round) == ("over", 4)


def test_a_round_that_over_selects_goes_on_without_the_last(folder: Path) -> None:
    devices: Devices = {f"d{index}": partial(ToyTrainer, GOAL, rank=2) for index in range(6)}
    fleet = fleet_in(
        folder, "over", *BRISK, "rounds.fraction_train=0.5", "rounds.over_select=1.4", "rounds.num_rounds=5",
        "rounds.min_available_nodes=6", devices=devices,
    ).run()  # fmt: skip
    assert {updates for _, updates in fleet.merges()} == {3}
    trained = sum(len(trainer.rounds) for made in fleet.trainers.values() for trainer in made)
    assert trained > 15, "some trained in vain"
    check_books(fleet)


def test_the_pair_of_most_tests_finishes_by_default_settings_too(folder: Path) -> None:
    fleet = fleet_in(folder, "pair", *BRISK, *BUFFERED, devices=PAIR).run()
    assert [number for number, _ in fleet.merges()] == [1, 1, 2, 2]
    check_books(fleet)
