"""Bands over real brokers to a device whose link is so slow that they could be taken for lost."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random

import pytest

from edge_runtime import fetching
from edge_runtime.fetching import Fetching
from edge_runtime.state import DeviceState
from edge_runtime.wire import blobs, topics
from edge_runtime.wire.broker import EmbeddedBroker
from edge_runtime.wire.bucket import Rates
from edge_runtime.wire.mqtt import connect

pytestmark = pytest.mark.broker

CHUNK, CHUNKS = 32 * 1024, 8
RATE = 64 * 1024
"""Bytes a second: a chunk takes more than twice the patience that the test leaves."""


def test_bands_on_a_slow_link_come_once_however_long_they_take(
    any_broker: EmbeddedBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "STILL_SECONDS", 0.2)
    payload = Random(0).randbytes(CHUNK * CHUNKS)
    ref = blobs.describe(payload, CHUNK)
    server = connect(any_broker.address, "server", on_event=lambda _: None, random=Random(1))
    for index, chunk in enumerate(blobs.split(payload, CHUNK)):
        server.publish(topics.broadcast("fleet", ref.sha256, index), chunk, retain=True)
    assert server.flush(10.0)
    device = connect(any_broker.address, "a", on_event=lambda _: None, random=Random(2), rates=Rates(down=RATE))
    disk, calls = DeviceState(tmp_path / "a"), 0

    def call() -> None:
        nonlocal calls
        calls += 1
        device.publish("fleet/a/status", b"here")

    fetch, ends = Fetching("fleet", device, disk, time.monotonic), time.monotonic() + 30
    fetch.begin({ref.sha256: ref})
    while not fetch.complete and time.monotonic() < ends:
        if (delivery := device.receive(0.05)) is not None:
            delivery.ack()
            found = topics.parse("fleet", delivery.topic)
            assert found is not None
            fetch.take(found.digest, found.chunk, delivery.payload)
        fetch.look_again(call)
    device.receive(1.0)  # whatever else the broker sends
    assert disk.band(ref.sha256) == payload
    assert calls, "it was long enough to look"
    assert device.bytes_received < 1.1 * len(payload)
    for transport in (device, server):
        transport.close()
    disk.close()
