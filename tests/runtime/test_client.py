"""The device's shell: one life, and what it fetches."""

from __future__ import annotations

import pytest

from edge_runtime.client import FINISHED
from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.algebra import cut
from edge_runtime.wire import bands, blobs, codec, topics
from edge_runtime.wire.messages import (
    Accepted,
    Hello,
    Need,
    Offer,
    Presence,
    Rejected,
    Report,
    dump,
    load,
)
from tests.runtime.desk import EDGES, FLEET, GOAL, NAME, WELCOME, Desk, adapter, of, offered, states
from tests.runtime.said import directive
from tests.runtime.toy import ToyTrainer

# ── a life ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_device_says_that_it_is_there_and_nothing_else_until_it_is_directed(desk: Desk) -> None:
    assert desk.work() == [
        Presence(client=NAME, state="online"),
        Presence(client=NAME, state="offline"),
    ]
    assert load(desk.broker.retained[topics.status(FLEET, NAME)]) == Presence(client=NAME, state="offline")


def test_a_device_whose_link_is_lost_is_offline_by_its_last_will(desk: Desk) -> None:
    desk.transport.publish(topics.status(FLEET, NAME), dump(Presence(client=NAME, state="online")), retain=True)
    desk.transport.drop()
    assert load(desk.broker.retained[topics.status(FLEET, NAME)]) == Presence(client=NAME, state="offline")


def test_it_plans_and_introduces_itself(desk: Desk) -> None:
    said = desk.tell(directive("gather", 0))
    [hello] = of(Hello, said)
    assert (hello.client, hello.base, hello.examples, hello.plan) == (NAME, "b" * 64, 10, "train 2, hold 4")
    assert {(part.held, part.trained) for part in hello.groups} == {(4, 2)}
    assert states(said) == ["planned"]


def test_it_trains_what_it_received_and_offers_the_change(desk: Desk) -> None:
    whole = adapter(1)
    said = desk.tell(desk.publish(whole), WELCOME)
    [offer] = of(Offer, said)
    decoded = bands.join([codec.decode(codec.encode(bands.band(whole, *edges), "int8")) for edges in EDGES])
    twin = ToyTrainer(GOAL, rank=2, held=4)
    twin.introduce(desk.trainer.specs[0], directive().training, None, lambda _: None)
    twin.receive(Adapter({name: cut(pair, 4) for name, pair in decoded.items()}))
    wanted = codec.encode(twin.train(directive().training, 1, lambda _: None, lambda: False).change, "int8")
    assert offer.blob == blobs.describe(wanted, 64)
    assert desk.disk.outbox == (offer, wanted)
    assert (offer.round, offer.version, offer.examples) == (1, 0, 10)
    assert offer.loss_last < offer.loss_first
    assert states(said) == ["planned", "fetching", "evaluating", "training", "offering"]
    assert [report.step for report in of(Report, said) if report.state == "training"] == [1, 2, 3]


def test_it_sends_the_chunks_that_are_needed_and_no_others(desk: Desk) -> None:
    offer = offered(desk)
    assert offer.blob.chunks > 3
    assert desk.uploads == []
    kept = desk.disk.outbox
    assert kept is not None
    chunks = blobs.split(kept[1], 64)
    desk.tell(Need(sha256=offer.blob.sha256, ranges=((1, 2), (3, 1 << 40))))
    assert desk.uploads == [(index, chunks[index]) for index in (1, *range(3, len(chunks)))]
    desk.uploads.clear()
    desk.tell(Need(sha256="0" * 64, ranges=((0, 2),)))
    assert desk.uploads == []


def test_an_accepted_update_is_forgotten_and_its_round_settled(desk: Desk) -> None:
    offer = offered(desk)
    desk.tell(Accepted(sha256=offer.blob.sha256, round=1))
    assert (desk.disk.outbox, desk.disk.settled) == (None, 1)
    desk.tell(Need(sha256=offer.blob.sha256, ranges=((0, 2),)))
    assert desk.uploads == []


def test_it_ends_with_a_personal_adapter_and_says_how_good_it_is(desk: Desk) -> None:
    offer = offered(desk)
    desk.tell(Accepted(sha256=offer.blob.sha256, round=1))
    said = desk.tell(desk.publish(adapter(2), "finish", 1, version=1))
    assert desk.delivered == 1
    assert desk.client.left
    assert states(said) == ["fetching", "evaluating", "personalising", "exporting", "done"]
    done = of(Report, said)[-1]
    assert done.export_max_logit_diff == 0.25
    assert done.held_out.personal is not None
    assert done.held_out.base == pytest.approx(desk.disk.fact("loss_base"))
    assert done.bytes_up > 0
    assert said[-1] == Presence(client=NAME, state="offline")
    # What the card of the adapter is written from.
    known = desk.disk.fact(FINISHED)
    assert (known["version"], known["rounds"]) == (1, 1)
    assert known["losses"] == {
        "base": done.held_out.base, "global": done.held_out.merged, "personal": done.held_out.personal,
    }  # fmt: skip


def test_without_personal_steps_the_global_adapter_is_exported_as_it_is(desk: Desk) -> None:
    none = directive().training.model_copy(update={"max_steps": 0})
    whole = adapter(2)
    desk.tell(desk.publish(whole, "finish", 1, version=1, training=none), WELCOME)
    assert desk.delivered == 1
    assert desk.trainer.rounds == []


# ── bands ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_fetches_the_bands_that_it_holds_and_no_others(desk: Desk) -> None:
    asked = desk.publish(adapter(1))
    desk.tell(asked, WELCOME)
    held = [desk.disk.band(band.blob.sha256) is not None for band in asked.bands]
    assert held == [True, True, False]
    own = {topics.status(FLEET, NAME), topics.down(FLEET, NAME), topics.directive(FLEET)}
    assert desk.transport._patterns.keys() == own, "unsubscribed from the bands"


def test_a_band_on_disk_is_not_fetched_again_after_a_restart(desk: Desk) -> None:
    asked = desk.publish(adapter(1))
    desk.tell(asked, WELCOME)
    desk.restart()
    for band in asked.bands:
        desk.server.publish(topics.broadcast(FLEET, band.blob.sha256, 0), b"", retain=True)
    offer = desk.disk.outbox
    assert offer is not None
    desk.work()
    assert of(Offer, desk.tell(WELCOME)) == [offer[0]], "offered again, not trained again"
    desk.tell(Rejected(code="round-closed", reason="because", sha256=offer[0].blob.sha256))
    again = desk.publish(adapter(1), round_number=2, version=0)
    assert of(Offer, desk.tell(again))


def test_bands_of_a_former_version_are_forgotten(desk: Desk) -> None:
    first = desk.publish(adapter(1))
    offer = of(Offer, desk.tell(first, WELCOME))[0]
    desk.tell(Accepted(sha256=offer.blob.sha256, round=1), desk.publish(adapter(2), round_number=2))
    assert [desk.disk.band(band.blob.sha256) for band in first.bands] == [None] * 3


def test_a_corrupt_band_is_said_and_fetched_again(desk: Desk) -> None:
    asked = desk.publish(adapter(1))
    topic = topics.broadcast(FLEET, asked.bands[0].blob.sha256, 0)
    good = desk.broker.retained[topic]
    desk.server.publish(topic, bytes(len(good)), retain=True)
    desk.tell(asked)
    desk.server.publish(topics.down(FLEET, NAME), dump(WELCOME))
    turns = iter(range(40))  # it would ask for the bad chunk for ever
    desk.client.run(lambda: next(turns) > 30, poll=0.0)
    desk.heard()
    assert any("fetch it again" in note for note in desk.notes)
    assert desk.disk.outbox is None
    desk.server.publish(topic, good, retain=True)
    assert of(Offer, desk.work())


def test_chunks_that_cannot_be_are_ignored(desk: Desk) -> None:
    asked = desk.publish(adapter(1))
    sha = asked.bands[0].blob.sha256
    desk.server.publish(topics.broadcast(FLEET, sha, 77), b"beyond the end", retain=True)
    desk.server.publish(topics.broadcast(FLEET, sha, 0), b"too short", retain=True)
    assert not of(Offer, desk.tell(asked, WELCOME))
    again = desk.publish(adapter(1))
    assert again == asked
    assert of(Offer, desk.work())


def test_a_fetch_that_can_never_end_does_not_keep_it_from_the_next_version(desk: Desk) -> None:
    """The broker forgot the bands while it fetched, and the server has gone on."""
    lost = desk.publish(adapter(1))
    for topic in [topic for topic in desk.broker.retained if "/blob/" in topic]:
        desk.server.publish(topic, b"", retain=True)
    assert not of(Offer, desk.tell(lost, WELCOME))
    [offer] = of(Offer, desk.tell(desk.publish(adapter(2), round_number=2)))
    assert (offer.round, offer.version) == (2, 1)
