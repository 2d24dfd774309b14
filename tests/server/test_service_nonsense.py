"""The server over the broker in memory: what nonsense does to it, which is nothing."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from edge_runtime.errors import AggregationError
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.wire import codec, topics
from edge_runtime.wire.messages import (
    Need,
    Presence,
    Rejected,
    Welcome,
    dump,
)
from server.staging import DAMAGED_TIMES
from tests.server.bench import FLEET, LAYER, Bench, Hand, accepted, training
from tests.wire.blobcraft import laid_out, relabelled

# ── nonsense ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_chunk_of_the_wrong_size_is_noted_and_asked_for_again(bench: Bench) -> None:
    first, _ = training(bench)
    offer, payload = first.train()
    first.say(offer)
    first.transport.publish(topics.upload(FLEET, "a", offer.blob.sha256, 0), b"short")
    first.transport.publish(topics.upload(FLEET, "a", offer.blob.sha256, 10**9), b"far away")
    assert first.heard() == []
    assert sum("which is wrong" in note for note in bench.notes) == 2
    assert first.deliver(offer, payload) == [accepted(offer)]


def test_an_upload_that_was_damaged_on_the_way_is_asked_for_again(bench: Bench) -> None:
    first, second = training(bench)
    second.deliver(*second.train())
    offer, payload = first.train()
    first.say(offer)
    [need] = first.send(offer, payload[:-1] + bytes([payload[-1] ^ 1]))
    assert need == Need(sha256=offer.blob.sha256, ranges=((0, offer.blob.chunks),)), "which chunk it was, nobody knows"
    assert bench.store.chunks(offer) == {}
    assert first.say(offer) == [], "an offer that is said again meanwhile is answered once the chunks stop coming"
    assert first.send(offer, payload)[0] == accepted(offer)
    assert bench.service.state.version == 1


def test_chunks_that_are_never_what_their_digest_names_are_refused_and_the_fleet_goes_on(bench: Bench) -> None:
    first, second = training(bench)
    offer, payload = first.train()
    first.say(offer)
    for _ in range(DAMAGED_TIMES):
        [need] = first.send(offer, bytes(len(payload)))
        assert isinstance(need, Need)
    [refusal] = first.send(offer, bytes(len(payload)))
    assert isinstance(refusal, Rejected)
    assert (refusal.code, refusal.sha256) == ("corrupt", offer.blob.sha256)
    assert bench.store.offer_of("a") is None
    second.deliver(*second.train())
    assert bench.service.state.version == 1


def one_pair(shape: tuple[int, int], rank: int, value: float = 0.0) -> Pair:
    return Pair(np.full((rank, shape[1]), value, np.float32), np.full((shape[0], rank), value, np.float32))


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"no blob at all", "not zstd"),
        (
            codec.encode(Adapter({"lm_head": one_pair((4, 4), 1)}), "fp32"),
            "layer 'lm_head' of 'a': expected no such layer",
        ),
        (
            codec.encode(Adapter({LAYER: one_pair((12, 17), 2)}), "fp32"),
            r"expected (12, 16) at rank 1 to 12, found (12, 17) at rank 2",
        ),
        (
            codec.encode(Adapter({LAYER: one_pair((12, 16), 13)}), "fp32"),
            r"expected (12, 16) at rank 1 to 12, found (12, 16) at rank 13",
        ),
        (codec.encode(Adapter({LAYER: one_pair((12, 16), 0)}), "fp32"), "at rank 0"),
        (
            relabelled(
                laid_out([[LAYER, 12, 16, [["fp32", 1]], [["fp32", 1]]]]), {"fp32": np.full(28, np.nan, np.float32)}
            ),
            "holds NaN or infinity",
        ),
    ],
    ids=["bytes", "layer", "shape", "rank", "no rank", "nan"],
)
def test_an_update_that_does_not_fit_is_refused_with_the_reason(bench: Bench, payload: bytes, reason: str) -> None:
    first, second = training(bench)
    [refusal] = first.deliver(*first.offer_of(payload))
    assert isinstance(refusal, Rejected)
    assert refusal.code == "corrupt"
    assert reason in refusal.reason
    second.deliver(*second.train())
    assert bench.service.state.version == 1, "the fleet goes on"


def test_an_offer_beyond_the_permitted_size_is_refused_before_anything_is_staged(make: Callable[..., Bench]) -> None:
    bench = make("wire.max_upload_bytes=100")
    first, _ = training(bench)
    offer, _ = first.train()
    [refusal] = first.say(offer)
    assert isinstance(refusal, Rejected)
    assert refusal.code == "too-large"
    assert bench.store.offer_of("a") is None


def test_whoever_was_never_heard_is_asked_to_say_hello(bench: Bench) -> None:
    training(bench)
    stranger = Hand(bench, "c")
    offer, _ = stranger.train()
    [refusal] = stranger.say(offer)
    assert isinstance(refusal, Rejected)
    assert refusal.code == "unknown-client"


def test_another_base_or_other_shapes_are_refused(bench: Bench) -> None:
    training(bench)
    odd = Hand(bench, "c")
    [refusal] = odd.hello(base="c" * 64)
    assert isinstance(refusal, Rejected)
    assert refusal.code == "fingerprint"
    wider = tuple(part.model_copy(update={"d_in": 99}) for part in odd.introduction(bench.directive.adapter).groups)
    [refusal] = odd.hello(groups=wider)
    assert isinstance(refusal, Rejected)
    assert refusal.code == "shape"
    assert set(bench.service.state.members) == {"a", "b"}


def nonsense(hand: Hand) -> list[tuple[str, bytes]]:
    """What a stranger, a broken device or an older version might publish."""
    hello = hand.introduction(hand.bench.directive.adapter)
    doubled = hello.model_copy(update={"groups": (*hello.groups, *hello.groups)})
    greedy = hello.model_copy(
        update={"groups": tuple(part.model_copy(update={"trained": part.held + 1}) for part in hello.groups)}
    )
    up, status = topics.up(FLEET, "a"), topics.status(FLEET, "a")
    return [
        (up, b""),
        (up, b"{"),
        (up, b"\xff" * 100),
        (up, b'{"type": "hello", "v": 1}'),
        (up, dump(hello).replace(b'"v":1', b'"v":2')),
        (up, b" " * 200_000),
        (up, dump(hello.model_copy(update={"client": "b"}))),
        (up, dump(Welcome(client="a", fleet=FLEET))),
        (up, dump(hand.bench.directive)),
        (up, dump(doubled)),
        (up, dump(greedy)),
        (status, dump(Presence(client="b", state="offline"))),
        (status, b"offline"),
        (topics.upload(FLEET, "a", "0" * 64, 0), b"chunk of nothing"),
        (f"edge/{FLEET}/c/a/blob/xyz/0", b"no digest"),
        (f"edge/{FLEET}/c/a/blob/{'0' * 64}/-1", b"no number"),
        (f"edge/{FLEET}/c/-a-/up", b"{}"),
    ]


def test_nonsense_changes_nothing_and_stops_nobody(bench: Bench) -> None:
    first, second = training(bench)
    before = bench.service.state.model_copy(update={"progress_at": 0.0})
    for topic, payload in nonsense(first):
        first.transport.publish(topic, payload)
        answers = first.heard()
        assert len(answers) <= (topic == topics.up(FLEET, "a")), topic
        assert all(isinstance(answer, Rejected) and answer.code == "malformed" for answer in answers)
    assert bench.service.state.model_copy(update={"progress_at": 0.0}) == before
    assert len([note for note in bench.notes if note.startswith("dropped a message on")]) == 12
    for hand in (first, second):
        hand.deliver(*hand.train())
    assert bench.service.state.version == 1


def test_our_own_failure_is_no_nonsense_from_outside(make: Callable[..., Bench]) -> None:
    """What goes wrong while merging must not be taken for a bad message, or the fleet would wait for ever."""
    bench = make("rounds.min_available_nodes=1")
    [first] = training(bench, {"a": 2})
    offer, payload = first.train()
    first.say(offer)
    bench.store._db.execute("UPDATE versions SET state = x'00'")
    with pytest.raises(AggregationError, match="does not load"):
        first.send(offer, payload)


def test_a_first_device_with_absurd_layers_is_refused_before_anything_is_allocated(make: Callable[..., Bench]) -> None:
    """Whatever it says of its layers, the server would make a global adapter for them."""
    bench = make("rounds.min_available_nodes=1")
    hand = Hand(bench, "a")
    sound = hand.introduction(bench.directive.adapter)
    [huge, *_] = (part.model_copy(update={"d_out": 1 << 24, "layers": ((0, 1000),)}) for part in sound.groups)
    [refusal] = hand.say(sound.model_copy(update={"groups": (huge,)}))
    assert isinstance(refusal, Rejected)
    assert (refusal.code, bench.directive.phase) == ("shape", "gather")
    assert re.search(r"this server bears \d+; raise \[wire\] max_upload_bytes", refusal.reason)
    assert hand.hello() == [Welcome(client="a", fleet=FLEET)]
