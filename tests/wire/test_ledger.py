"""Counters never come twice and never go back: over kills, restores and clocks that jump."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError
from edge_runtime.wire import ledger as ledgers
from edge_runtime.wire.ledger import CREDIBLE, Ledger
from edge_runtime.wire.signing import MAX_COUNTER
from tests.runtime.fleets import in_memory
from tests.strategies import laws


@laws
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-(1 << 62), 1 << 62)), min_size=1, max_size=6))
def test_numbers_rise_over_crashes_whatever_the_clock_says(lives: list[tuple[int, int]]) -> None:
    drawn: list[int] = []
    with in_memory() as place:
        for count, clock in lives:
            ledger = Ledger(place / "ledger", partial(int, clock))
            drawn += [ledger.draw() for _ in range(count)]
            ledger._db.close()  # as a kill does: nothing is tidied up

    assert drawn == sorted(set(drawn))
    assert all(0 <= number <= MAX_COUNTER for number in drawn)


def test_a_block_that_is_used_up_is_followed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "BLOCK", 1 << 10)
    ledger = Ledger(tmp_path / "ledger", lambda: 1000)
    drawn = [ledger.draw() for _ in range((1 << 10) + 3)]

    assert drawn == list(range(1000, 1000 + (1 << 10) + 3))


def test_of_two_ledgers_of_one_key_the_one_that_draws_later_draws_higher(tmp_path: Path) -> None:
    """Whoever copied a key to a second device must not silence the first."""
    now = 1_790_000_000_000_000
    first, second = (Ledger(tmp_path / name, lambda: now) for name in ("first", "second"))
    drawn = []
    for ledger in (first, second, second, first, second, first, first):
        now += 1_000_000
        drawn.append(ledger.draw())
    assert drawn == sorted(set(drawn))


@laws
@given(st.lists(st.one_of(st.none(), st.integers(-(1 << 62), 1 << 62)), max_size=30))
def test_numbers_rise_while_the_clock_jumps_and_processes_are_killed(moves: list[int | None]) -> None:
    drawn: list[int] = []
    clock = [0]
    with in_memory() as place:
        ledger = Ledger(place / "ledger", lambda: clock[-1])
        for move in moves:
            if move is None:
                ledger._db.close()
                ledger = Ledger(place / "ledger", lambda: clock[-1])
            else:
                clock.append(move)
            drawn.append(ledger.draw())
        ledger._db.close()
    assert drawn == sorted(set(drawn))


def test_a_ledger_that_was_lost_or_restored_goes_on_above_what_it_had(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", lambda: 1_790_000_000_000_000)
    ledger.draw()
    ledger.close()
    shutil.copyfile(tmp_path / "ledger", tmp_path / "backup")
    ledger = Ledger(tmp_path / "ledger", lambda: 1_790_000_100_000_000)
    last = [ledger.draw() for _ in range(10)][-1]
    ledger.close()

    shutil.copyfile(tmp_path / "backup", tmp_path / "ledger")
    assert Ledger(tmp_path / "ledger", lambda: 1_790_000_200_000_000).draw() > last
    assert Ledger(tmp_path / "new", lambda: 1_790_000_200_000_000).draw() > last


def test_an_incredible_clock_does_not_use_up_the_numbers(tmp_path: Path) -> None:
    assert Ledger(tmp_path / "ledger", lambda: CREDIBLE).draw() == 0


def test_what_was_taken_is_remembered_by_key_and_kind(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    assert ledger.highest("k", "up") == -1
    ledger.take("k", "up", 7)
    ledger.take("k", "up", 5)
    ledger.take("k", "status", 3)
    ledger.close()

    again = Ledger(tmp_path / "ledger")
    assert [again.highest(*at) for at in (("k", "up"), ("k", "status"), ("l", "up"))] == [7, 3, -1]


def _take_and_die(path: Path) -> None:
    ledger = Ledger(path)
    ledger.take("k", "up", 7)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_was_taken_survives_a_killed_process(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_take_and_die, args=(tmp_path / "ledger",))
    process.start()
    process.join()

    assert process.exitcode == -signal.SIGKILL
    assert Ledger(tmp_path / "ledger").highest("k", "up") == 7


def test_two_processes_with_one_key_are_one_too_many(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "ledger")
    with pytest.raises(ConfigError, match="stop the other process with this key"):
        Ledger(tmp_path / "ledger")
    first.close()
