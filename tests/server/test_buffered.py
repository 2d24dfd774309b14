"""Rounds that do not wait: a buffer is merged when it is full, and what is old counts as a change of what it was of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.lora.adapter import Adapter
from edge_runtime.wire import topics
from edge_runtime.wire.messages import Need, Offer, Rejected
from server.aggregators.method import load_state
from server.service import Service
from server.store import Store
from tests.runtime.toy import SHAPES
from tests.runtime.turns import fleet_config
from tests.server.bench import FLEET, Bench, Hand, accepted, training

BUFFERED = ("rounds.mode=buffered", "wire.codec_up=fp32", "wire.codec_down=fp32", "rounds.num_rounds=6")


def state_of(bench: Bench, version: int) -> dict[str, np.ndarray]:
    """What a version adds to the base and what it carries, together, dense in float64."""
    stored = bench.store.version(version)
    assert stored is not None
    state = load_state(stored.state)
    return {
        name: dense(state.adapter, name) + (dense(state.tail, name) if name in state.tail else 0) for name in SHAPES
    }


def dense(adapter: Adapter, name: str) -> np.ndarray:
    return adapter[name].b.astype(np.float64) @ adapter[name].a.astype(np.float64)


def change_of(hand: Hand) -> dict[str, np.ndarray]:
    """What the last training of a device changed, dense."""
    before = hand.trainer._received
    return {name: dense(hand.trainer.live, name) - dense(before, name) for name in SHAPES}


def test_an_update_of_an_older_version_counts_as_the_change_of_that_version_and_less(
    make: Callable[..., Bench],
) -> None:
    bench = make(*BUFFERED, "rounds.buffer_size=1", "rounds.staleness_exponent=0.7")
    slow, fast = training(bench, {"slow": 4, "fast": 2})
    old = slow.train()
    theirs = change_of(slow)
    for version in (1, 2):
        offer, payload = fast.train()
        assert accepted(offer) in fast.deliver(offer, payload)
        assert bench.service.state.version == version
    before = state_of(bench, 2)
    offer, payload = old
    assert (offer.round, offer.version) == (1, 0)
    assert accepted(offer) in slow.deliver(offer, payload)
    after = state_of(bench, 3)
    for name in SHAPES:
        wanted = before[name] + 3.0**-0.7 * theirs[name]
        assert np.linalg.norm(after[name] - wanted) < 1e-5 * np.linalg.norm(wanted)
    [record] = [record for record in bench.records if record["event"] == "update" and record["age"]]
    assert (record["client"], record["age"], record["round"]) == ("slow", 2, 3)
    assert any("trained 2 versions ago" in note for note in bench.notes)


def test_two_updates_of_one_device_fit_into_one_buffer(make: Callable[..., Bench]) -> None:
    bench = make(*BUFFERED, "rounds.buffer_size=2", "rounds.staleness_exponent=1")
    slow, fast, other = training(bench, {"slow": 4, "fast": 2, "other": 2})
    old = slow.train()
    first = change_of(slow)
    for hand in (fast, other):
        hand.deliver(*hand.train())
    before = state_of(bench, 1)
    assert accepted(old[0]) in slow.deliver(*old)
    new = slow.train()
    second = change_of(slow)
    assert bench.service.state.version == 1
    assert accepted(new[0]) in slow.deliver(*new)
    assert bench.service.state.version == 2
    after = state_of(bench, 2)
    for name in SHAPES:
        wanted = before[name] + 0.5 * (0.5 * first[name] + second[name])
        assert np.linalg.norm(after[name] - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_an_accepted_update_is_accepted_again_and_counts_once(make: Callable[..., Bench]) -> None:
    bench = make(*BUFFERED, "rounds.buffer_size=2")
    slow, fast = training(bench, {"slow": 4, "fast": 2})
    offer, payload = slow.train()
    slow.deliver(offer, payload)
    bench.restart()
    assert slow.say(offer) == [accepted(offer)]
    fast.deliver(*fast.train())
    assert bench.service.state.version == 1
    assert slow.say(offer) == [accepted(offer)], "it is merged; whoever was away is told so"
    assert bench.service.state.filled == 0


def code(answers: list[object]) -> str:
    [answer] = answers
    assert isinstance(answer, Rejected)
    return answer.code


def test_what_is_too_old_is_refused_with_its_age(make: Callable[..., Bench]) -> None:
    bench = make(*BUFFERED, "rounds.buffer_size=1", "rounds.max_staleness=1")
    slow, fast = training(bench, {"slow": 4, "fast": 2})
    offer, _ = slow.train()
    for _ in range(2):
        fast.deliver(*fast.train())
    [answer] = slow.say(offer)
    assert isinstance(answer, Rejected)
    assert answer.code == "round-closed"
    assert "2 behind the fleet's 2, and updates count up to 1 behind" in answer.reason
    assert "max_staleness" in answer.reason


def test_an_upload_under_way_survives_the_merge_of_a_buffer_while_it_counts(make: Callable[..., Bench]) -> None:
    bench = make(*BUFFERED, "rounds.buffer_size=1", "rounds.max_staleness=1")
    slow, fast = training(bench, {"slow": 4, "fast": 2})
    offer, payload = slow.train()
    [need] = slow.say(offer)
    assert isinstance(need, Need)
    slow.send(offer, payload, [0, 1])
    fast.deliver(*fast.train())
    assert bench.store.have(offer) == {0, 1}
    chunks = offer.blob.chunks
    assert accepted(offer) in slow.send(offer, payload, list(range(2, chunks)))
    assert bench.service.state.version == 2


def test_an_upload_that_has_grown_too_old_gives_its_room(make: Callable[..., Bench]) -> None:
    bench = make(*BUFFERED, "rounds.buffer_size=1", "rounds.max_staleness=1")
    slow, fast = training(bench, {"slow": 4, "fast": 2})
    offer, payload = slow.train()
    slow.say(offer)
    slow.send(offer, payload, [0])
    for _ in range(2):
        fast.deliver(*fast.train())
    assert bench.store.offer_of("slow") is None
    assert bench.store.staged_bytes() == 0


def test_an_update_that_was_never_asked_for_is_refused_however_old_it_is(make: Callable[..., Bench]) -> None:
    bench = make(*BUFFERED, "rounds.buffer_size=1", "rounds.fraction_train=0.5", "rounds.min_available_nodes=4")
    hands = training(bench, dict.fromkeys("abcd", 2))
    asked = [hand for hand in hands if bench.directive.asks(hand.name)]
    [other, *_] = [hand for hand in hands if not bench.directive.asks(hand.name)]
    offer, _ = other.train()
    asked[0].deliver(*asked[0].train())
    assert code(list(other.say(offer))) == "round-closed"


def test_bands_of_the_versions_that_devices_may_be_fetching_stay_on_the_broker(make: Callable[..., Bench]) -> None:
    bench = make(*BUFFERED, "rounds.buffer_size=1", "rounds.max_staleness=2")
    slow, fast = training(bench, {"slow": 4, "fast": 2})
    directives = [bench.directive]
    for _ in range(4):
        fast.deliver(*fast.train())
        directives.append(bench.directive)
    for topic in [topic for topic in bench.broker.retained if "/blob/" in topic]:
        slow.transport.publish(topic, b"", retain=True)  # a broker that forgot
    bench.restart()
    for behind in (0, 1, 2):
        assert bench.broadcast(directives[4 - behind]).sizes.keys() == SHAPES.keys()
    gone = directives[1].bands[0].blob
    assert topics.broadcast(FLEET, gone.sha256, 0) not in bench.broker.retained
    assert bench.directive.max_staleness == 2


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (("rounds.mode=buffered", "aggregator.method=svd"), "has no increments"),
        (("rounds.mode=buffered", "aggregator.method=zero_pad"), "has no increments"),
        (("rounds.mode=buffered", "rounds.over_select=1.5", "rounds.fraction_train=0.5"), "over_select is for mode"),
        (("rounds.buffer_size=3",), "buffer_size is for mode"),
        (("rounds.over_select=1.5",), "lower fraction_train"),
        (("rounds.mode=buffered", "rounds.buffer_size=2", "aggregator.robust=krum", "aggregator.byzantine=1"), "needs"),
    ],
)
def test_keys_that_have_no_meaning_together_are_refused_at_the_start(
    tmp_path: Path, overrides: tuple[str, ...], match: str
) -> None:
    store = Store(tmp_path)
    broker = Bench(tmp_path / "other").broker
    with pytest.raises(ConfigError, match=match):
        Service(fleet_config(*overrides), broker.connect("x"), store, say=print, record=lambda _: None)
    store.close()


def test_a_round_that_over_selects_is_closed_by_the_first(make: Callable[..., Bench]) -> None:
    bench = make("rounds.fraction_train=0.5", "rounds.over_select=1.5", "rounds.min_available_nodes=4", *BUFFERED[1:])
    hands = [hand for hand in training(bench, dict.fromkeys("abcd", 2)) if bench.directive.asks(hand.name)]
    assert len(hands) == 3
    offers: list[tuple[Offer, bytes]] = [hand.train() for hand in hands]
    for hand, (offer, payload) in list(zip(hands, offers, strict=True))[:2]:
        assert accepted(offer) in hand.deliver(offer, payload)
    assert bench.service.state.version == 1
    assert code(list(hands[2].say(offers[2][0]))) == "round-closed"


def test_an_update_of_a_layer_too_many_or_of_another_rank_is_refused_by_name(make: Callable[..., Bench]) -> None:
    bench = make(*BUFFERED[1:])
    _, b = training(bench)
    wider = Hand(bench, "a", rank=8)
    answers = wider.deliver(*wider.train())
    assert any(isinstance(answer, Rejected) and "has rank 8 in layer" in answer.reason for answer in answers)
    assert not bench.service.state.stored
    assert accepted((update := b.train())[0]) in b.deliver(*update)
