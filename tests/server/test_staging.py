"""Bounds on what devices make a server keep, and what becomes of uploads that nobody finishes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import scale
from edge_runtime.wire import codec, topics
from edge_runtime.wire.messages import Need, Offer, Rejected, Report, dump
from tests.server.bench import FLEET, Bench, Hand, accepted, training

TRIO = {"a": 2, "b": 2, "c": 2}


def tight(make: Callable[..., Bench], *overrides: str) -> tuple[Bench, list[Hand]]:
    """A server with room for one upload and a half."""
    probe = make("rounds.min_available_nodes=3")
    size = training(probe, TRIO)[0].train()[0].blob.size
    probe.store.close()
    bench = Bench(
        probe.folder / "tight", "rounds.min_available_nodes=3", f"server.max_staged_bytes={size * 3 // 2}", *overrides
    )
    return bench, training(bench, TRIO)


def test_who_comes_when_the_room_is_taken_waits_and_loses_nothing(make) -> None:
    bench, (first, second, third) = tight(make)
    one, two = first.train(), second.train()
    assert isinstance(first.say(one[0])[0], Need)
    [refusal] = second.say(two[0])
    assert isinstance(refusal, Rejected)
    assert (refusal.code, refusal.sha256) == ("quota", two[0].blob.sha256)
    assert first.say(one[0]) == []
    bench.wait()
    assert isinstance(first.heard()[0], Need), "who is admitted stays so"
    assert first.send(*one) == [accepted(one[0])]
    assert second.deliver(*two) == [accepted(two[0])]
    third.deliver(*third.train())
    assert bench.service.state.version == 1
    assert bench.store.staged() == {}
    bench.store.close()


def test_an_upload_that_does_not_move_gives_way_but_only_then_and_only_if_somebody_needs_it(make) -> None:
    bench, (first, second, _) = tight(make)
    one, two = first.train(), second.train()
    first.say(one[0])
    for _ in range(5):  # it moves, however slowly
        bench.clock.now += 299
        first.send(*one, [int(bench.clock.now) % one[0].blob.chunks])
    assert isinstance(second.say(two[0])[0], Rejected)
    bench.clock.now += 301
    assert set(bench.store.staged()) == {"a"}, "nobody needed its room until now"
    assert second.deliver(*two) == [accepted(two[0])]
    assert first.deliver(*one) == [accepted(one[0])], "it begins again"
    bench.store.close()


def test_a_restart_gives_uploads_their_full_time_again(make) -> None:
    bench, (first, second, _) = tight(make)
    one, two = first.train(), second.train()
    first.say(one[0])
    first.send(*one, [0])
    bench.clock.now += 10_000
    bench.restart()
    assert isinstance(second.say(two[0])[0], Rejected)
    bench.clock.now += 301
    assert second.deliver(*two) == [accepted(two[0])]
    bench.store.close()


def test_uploads_of_a_round_that_closed_are_dropped_with_it(make) -> None:
    bench = make("rounds.progress_timeout=10", "rounds.quorum=0.5")
    first, second = training(bench)
    half, rest = second.train()
    second.say(half)
    second.send(half, rest, [0, 1])
    first.deliver(*first.train())
    bench.clock.now += 11
    bench.service.tick()
    assert bench.service.state.version == 1
    assert bench.store.staged() == {}
    assert bench.store.chunks(half) == {}
    [refusal] = second.say(half)
    assert isinstance(refusal, Rejected)
    assert refusal.code == "round-closed"


def test_a_slow_upload_is_not_given_up_and_one_that_only_repeats_itself_is(make) -> None:
    bench = make("rounds.progress_timeout=60", "rounds.quorum=0.5")
    first, second = training(bench)
    first.deliver(*first.train())
    slow, payload = second.train()
    second.say(slow)
    for index in range(slow.blob.chunks - 1):
        bench.clock.now += 59
        bench.service.tick()
        second.send(slow, payload, [index])
    assert bench.service.state.round == 1, "a chunk a minute is progress"
    for _ in range(3):
        bench.clock.now += 30
        second.send(slow, payload, [0])
        bench.service.tick()
    assert bench.service.state.round == 2, "the same chunk again is none"


def test_an_update_offered_in_smaller_chunks_keeps_what_is_here(bench: Bench) -> None:
    first, _ = training(bench)
    offer, payload = first.train()
    first.say(offer)
    first.send(offer, payload, [0, 1, 4])
    smaller = offer.model_copy(update={"blob": offer.blob.model_copy(update={"chunk_bytes": 32})})
    [need] = first.say(smaller)
    assert isinstance(need, Need)
    assert need.ranges == ((4, 8), (10, smaller.blob.chunks))
    assert first.send(smaller, payload) == [accepted(offer)]


def test_a_fleet_takes_so_many_devices_and_tells_the_next(make) -> None:
    bench = make("server.max_members=2")
    training(bench)
    late = Hand(bench, "c")
    [refusal] = late.hello()
    assert isinstance(refusal, Rejected)
    assert refusal.code == "fleet-full"
    assert set(bench.service.state.members) == {"a", "b"}


def test_strangers_leave_no_records(bench: Bench) -> None:
    training(bench)
    before = len(bench.records)
    stranger = bench.broker.connect("x")
    for number in range(50):
        report = Report(client=f"x{number}", state="training", round=1)
        stranger.publish(topics.up(FLEET, f"x{number}"), dump(report))
        stranger.publish(topics.up(FLEET, "x"), b"{" * number)
    bench.pump()
    assert len(bench.records) == before
    for _ in range(1000):
        stranger.publish(topics.up(FLEET, "x"), b"nonsense")
    bench.pump()
    assert sum(note.startswith("dropped") for note in bench.notes) < 150


def update_of(hand: Hand, factor: float) -> tuple[Offer, bytes]:
    """Its update, so many times as large."""
    _, payload = hand.train()
    change = codec.decode(payload)
    larger = Adapter({name: Pair(scale(pair, factor).a, scale(pair, factor).b) for name, pair in change.items()})
    return hand.offer_of(codec.encode(larger, "fp32"))


def test_an_absurd_update_is_refused_counted_and_told_and_the_fleet_goes_on(make) -> None:
    ranks = dict.fromkeys("abcde", 2)
    bench = make("rounds.min_available_nodes=5", "wire.codec_up=fp32")
    *honest, liar = training(bench, ranks)
    for hand in honest[:-1]:
        hand.deliver(*hand.train())
    [refusal] = liar.deliver(*update_of(liar, 1e4))
    assert isinstance(refusal, Rejected)
    assert refusal.code == "norm"
    assert "times the usual" in refusal.reason
    honest[-1].deliver(*honest[-1].train())
    assert bench.service.state.version == 1
    assert {layer["updates"] for r in bench.records if r["event"] == "merge" for layer in r["layers"].values()} == {4}
    # In the next round the former one is the yardstick, so that not even the first to come may lie.
    [refusal] = liar.deliver(*update_of(liar, 1e4))
    assert isinstance(refusal, Rejected)
    assert refusal.code == "norm"
    bench.service.tick()
    assert bench.store.refusals() == {"norm": 2}
    bench.restart()
    assert "refused in all: 2 norm" in bench.notes[-1]


@pytest.mark.parametrize("examples", [1_000_001, 1 << 40])
def test_an_insane_weight_is_refused(bench: Bench, examples: int) -> None:
    first, second = training(bench)
    offer, _ = first.train()
    [refusal] = first.say(offer.model_copy(update={"examples": examples}))
    assert isinstance(refusal, Rejected)
    assert refusal.code == "examples"
    second.deliver(*second.train())
    assert bench.service.state.version == 1, "it is not waited for"


def test_no_examples_at_all_are_malformed_and_the_device_is_told(bench: Bench) -> None:
    first, _ = training(bench)
    offer, _ = first.train()
    first.transport.publish(topics.up(FLEET, "a"), dump(offer).replace(b'"examples":10', b'"examples":0'))
    [refusal] = first.heard()
    assert isinstance(refusal, Rejected)
    assert refusal.code == "malformed"
    assert "examples" in refusal.reason
    assert np.isfinite(offer.loss_first)
