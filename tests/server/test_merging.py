"""A merge that cannot be: the round closes with the version it began with, and the fleet goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from edge_runtime.errors import AggregationError
from server import aggregators, outcome
from server.aggregators.method import Merged, State, Update
from server.service import Service
from tests.server.bench import Bench, Hand, training
from tests.server.merging import learnt_state, updates_from


def refusing(service: Service) -> None:
    """Let every merge read its updates, and then refuse them."""

    def combine(_state: State, updates: Iterable[Update]) -> Merged:
        raise AggregationError(f"a rule refused {len(list(updates))} updates")

    service._merging._method = service._method._replace(combine=combine)


def finish(bench: Bench, hands: Iterable[Hand]) -> None:
    """The devices of `training` train and deliver once."""
    for hand in hands:
        hand.deliver(*hand.train())


def test_a_refused_merge_closes_its_round_with_the_old_version_and_the_next_one_merges(
    make: Callable[..., Bench],
) -> None:
    bench = make()
    hands = training(bench)
    method, before = bench.service._method, bench.broadcast().digest()
    refusing(bench.service)
    finish(bench, hands)
    assert (bench.service.state.round, bench.service.state.version) == (2, 0)
    assert bench.store.versions() == [0], "nothing is half applied"
    assert bench.broadcast().digest() == before
    assert any("round 1: not merged, version 0 stays: a rule refused 2 updates" in note for note in bench.notes)
    [refused] = [record for record in bench.records if record["event"] == "merge refused"]
    assert (refused["round"], refused["reason"]) == (1, "a rule refused 2 updates")
    assert bench.service._journal.refusals["merge"] == 1
    bench.service._merging._method = method
    finish(bench, hands)
    assert (bench.service.state.phase, bench.service.state.version) == ("finish", 1)


def test_a_server_that_restarts_after_a_refused_merge_goes_on_from_the_next_round(make: Callable[..., Bench]) -> None:
    bench = make()
    hands = training(bench)
    refusing(bench.service)
    finish(bench, hands)
    bench.restart()
    assert (bench.service.state.phase, bench.service.state.round) == ("train", 2)
    finish(bench, hands)
    assert bench.service.state.version == 1


def test_other_errors_of_a_merge_are_no_refusal() -> None:
    """A bug, or a store that is broken, must not pass for bad updates."""
    method, state = aggregators.build("increment"), learnt_state(8)

    def broken(_state: State, _updates: Iterable[Update]) -> Merged:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        outcome.attempt(method._replace(combine=broken), state, updates_from(state, method, [2]))
    assert isinstance(outcome.attempt(method, state, []), AggregationError)
