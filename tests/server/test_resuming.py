"""Uploads that are resumed: nothing is asked for that is still on its way, and what was merged stays accepted."""

from __future__ import annotations

from edge_runtime.wire.messages import Need
from tests.server.bench import Bench, accepted, training


def test_an_offer_that_is_said_again_is_answered_when_its_chunks_have_stopped_coming(bench: Bench) -> None:
    """It may overtake them: what a broker still has on its way, or MQTT sends again, must not be sent once more."""
    first, _ = training(bench)
    offer, payload = first.train()
    first.say(offer)
    assert first.say(offer) == []
    for index in range(offer.blob.chunks - 1):
        bench.clock.now += 0.9
        assert first.send(offer, payload, [index]) == []
    bench.wait(0.9)
    assert first.heard() == []
    bench.wait(0.2)
    assert first.heard() == [Need(sha256=offer.blob.sha256, ranges=((offer.blob.chunks - 1, offer.blob.chunks),))]
    bench.wait()
    assert first.heard() == [], "asked once for each time that it is said"


def test_a_resumed_upload_that_became_whole_is_asked_for_no_more(bench: Bench) -> None:
    """Nor is the next round's update, whose first answer is still on its way."""
    hands = training(bench)
    first, second = hands
    offer, payload = first.train()
    first.deliver(offer, payload)
    again, rest = second.train()
    second.say(again)
    second.say(again)
    second.send(again, rest)
    assert bench.service.state.round == 2
    following, _ = second.train()
    assert len(second.say(following)) == 1
    bench.wait()
    assert second.heard() == []


def test_a_device_that_was_away_learns_that_a_former_rounds_update_was_accepted(bench: Bench) -> None:
    """The answer was lost with the broker, and the fleet moved on: "refused" would be a lie."""
    hands = training(bench)
    made = [hand.train() for hand in hands]
    for hand, (offer, payload) in zip(hands, made, strict=True):
        hand.deliver(offer, payload)
    assert bench.service.state.round == 2
    offer, _ = made[0]
    assert hands[0].say(offer) == [accepted(offer)]
    bench.restart()
    assert hands[0].say(offer) == [accepted(offer)]
