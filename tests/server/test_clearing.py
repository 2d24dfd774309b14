"""Old versions leave the broker, whatever happens to it or to the server in between."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edge_runtime.wire.messages import Band
from tests.runtime.turns import Fuse, Killed
from tests.server.bench import Bench, Hand, training


def round_of(bench: Bench, hands: list[Hand]) -> None:
    """Everybody delivers."""
    for hand in hands:
        hand.deliver(*hand.train())


def retained(bench: Bench) -> set[str]:
    return {topic.split("/")[3] for topic in bench.broker.retained if "/blob/" in topic}


@pytest.mark.parametrize("operation", ["outdated", "retire"])
def test_clearing_that_a_crash_prevented_is_made_up_for(make: Callable[..., Bench], operation: str) -> None:
    """The server dies between the merge and all that clears an old version, or when only the broker has cleared it."""
    bench = make("rounds.num_rounds=5")
    hands = training(bench)
    first = {band.blob.sha256 for band in stored_bands(bench, 0)}
    round_of(bench, hands)
    offers = [hand.train() for hand in hands]
    hands[0].deliver(*offers[0])
    hands[1].say(offers[1][0])
    bench.store.close()
    fuse = Fuse()
    bench.begin(fuse)
    fuse.before = operation
    with pytest.raises(Killed):
        hands[1].send(*offers[1])
    assert (first <= retained(bench)) == (operation == "outdated")
    bench.restart()
    assert bench.service.state.version == 2
    assert retained(bench) == {band.blob.sha256 for version in (1, 2) for band in stored_bands(bench, version)}
    assert all(bench.store.blob(sha256) is None for sha256 in first)


def test_a_broker_that_went_back_to_an_older_memory_is_cleared_again(make: Callable[..., Bench]) -> None:
    """Mosquitto does, when it is killed between two snapshots."""
    bench = make("rounds.num_rounds=5")
    hands = training(bench)
    snapshot = dict(bench.broker.retained)
    for _ in range(3):
        round_of(bench, hands)
    bench.broker._exchange.retained |= snapshot
    bench.broker.restart()
    bench.wait()
    assert retained(bench) == {band.blob.sha256 for version in (2, 3) for band in stored_bands(bench, version)}


def stored_bands(bench: Bench, number: int) -> tuple[Band, ...]:
    found = bench.store.version(number)
    assert found is not None
    return found.bands
