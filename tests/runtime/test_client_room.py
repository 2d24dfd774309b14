"""A device whose disk is full, whose server has no room, whose broker takes little, or whose name is taken."""

from __future__ import annotations

from typing import Any

import pytest

from edge_runtime.conversation import REPEAT_SECONDS
from edge_runtime.errors import RejectedError
from edge_runtime.keeper import Watch
from edge_runtime.wire import blobs
from edge_runtime.wire.messages import Accepted, Need, Offer, Rejected, Report
from tests.runtime.desk import WELCOME, Desk, adapter, of, offered
from tests.runtime.test_client_faults import hear_nothing


@pytest.mark.parametrize("code", ["quota", "no-space", "fleet-full", "malformed"])
def test_what_the_server_cannot_take_now_is_kept_said_and_offered_again(desk: Desk, code: Any) -> None:
    offer = offered(desk)
    kept = desk.disk.outbox
    desk.tell(Rejected(code=code, reason="the disk is full", sha256=offer.blob.sha256))
    assert desk.disk.outbox == kept
    assert any("the disk is full" in note for note in desk.notes)
    assert hear_nothing(desk, REPEAT_SECONDS + 1) == [offer]
    desk.tell(Accepted(sha256=offer.blob.sha256, round=1))
    assert desk.disk.outbox is None


@pytest.mark.parametrize("code", ["corrupt", "norm", "examples", "too-large", "round-closed"])
def test_what_the_server_refuses_for_good_is_settled(desk: Desk, code: Any) -> None:
    offer = offered(desk)
    desk.tell(Rejected(code=code, reason="because", sha256=offer.blob.sha256))
    assert desk.disk.outbox is None
    assert desk.disk.settled == 1


def test_only_the_device_that_is_meant_leaves_a_name_to_another(desk: Desk) -> None:
    offered(desk)
    desk.tell(Rejected(code="duplicate", reason="two of one name", instance="another"))
    with pytest.raises(RejectedError, match="two of one name"):
        desk.tell(Rejected(code="duplicate", reason="two of one name", instance=""))


def test_an_update_that_the_broker_does_not_take_is_offered_in_smaller_chunks(desk: Desk) -> None:
    offer = offered(desk)
    kept = desk.disk.outbox
    assert kept is not None
    payload = kept[1] * 50
    big = offer.model_copy(update={"blob": blobs.describe(payload, 4096)})
    desk.disk.put_outbox(big, payload)
    desk.restart()
    desk.client._conversation.chunk_bytes = 4096
    desk.work()
    assert of(Offer, desk.tell(WELCOME)) == [big]
    desk.transport.largest = 1500
    [again] = of(Offer, desk.tell(Need(sha256=big.blob.sha256, ranges=((0, big.blob.chunks),))))
    assert again == big.model_copy(update={"blob": blobs.describe(payload, 1024)})
    assert desk.disk.outbox == (again, payload), "also after a restart"
    desk.tell(Need(sha256=big.blob.sha256, ranges=((0, again.blob.chunks),)))
    assert b"".join(chunk for _, chunk in desk.uploads) == payload


def test_a_device_whose_disk_is_full_says_so_waits_and_loses_nothing(desk: Desk) -> None:
    """SQLite gets no page more until the third try."""
    desk.transport.drop()
    desk.disk.close()
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        desk.clock.now += seconds
        if len(waits) == 3:
            desk.disk._db.execute("PRAGMA max_page_count = 1000000")

    desk.watch = Watch(clock=desk.clock, wait=wait)
    desk.begin()
    [(pages,)] = desk.disk._db.execute("PRAGMA page_count").fetchall()
    desk.disk._db.execute(f"PRAGMA max_page_count = {pages}")
    desk.work()
    said = desk.tell(
        desk.publish(
            adapter(
                1,
            ),
            codec="fp32",
        ),
        WELCOME,
    )
    if waits:
        assert len(waits) == 3
        assert sum("waits and tries again" in note for note in desk.notes) == 1
        assert [report.state for report in of(Report, said)].count("paused") == 1
    assert len(of(Offer, said)) == 1
    assert desk.disk.outbox is not None


def test_a_device_that_waits_for_room_can_be_stopped(desk: Desk) -> None:
    desk.transport.drop()
    desk.disk.close()
    desk.watch = Watch(clock=desk.clock, stop=lambda: True)
    desk.begin()
    [(pages,)] = desk.disk._db.execute("PRAGMA page_count").fetchall()
    desk.disk._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(KeyboardInterrupt):
        desk.disk.put_band("0" * 64, bytes(100_000))
    assert desk.disk.band("0" * 64) is None
