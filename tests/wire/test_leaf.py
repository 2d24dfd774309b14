"""Two NATS servers as hub and leaf: clients at two sites are on one broker, also when the link between them was cut."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.wire.broker import EmbeddedBroker, Settings, start
from edge_runtime.wire.transport import Delivery, Transport
from tests.wire.conftest import Clients
from tests.wire.relay import Relay, free_port, relay

pytestmark = pytest.mark.broker

ClientsOf = Callable[[EmbeddedBroker], Clients]


@dataclass
class Sites:
    """A hub, a leaf, the line between them, and clients at each."""

    hub: EmbeddedBroker
    leaf: EmbeddedBroker
    line: Relay
    at_hub: Clients
    at_leaf: Clients


@pytest.fixture
def sites(tmp_path: Path, to_broker: ClientsOf) -> Iterator[Sites]:
    port = free_port()
    with (
        start("nats", store=tmp_path / "hub", settings=Settings(ack_wait_s=2.0, hub_port=port)) as hub,
        relay(port) as line,
        start("nats", store=tmp_path / "leaf", settings=leaf_settings(line)) as leaf,
    ):
        yield Sites(hub, leaf, line, to_broker(hub), to_broker(leaf))


def leaf_settings(line: Relay) -> Settings:
    return Settings(ack_wait_s=2.0, leaf_of=f"127.0.0.1:{line.port}")


def taken(transport: Transport, *wanted: str, seconds: float = 60.0, again: str = "") -> dict[str, Delivery]:
    """Deliveries by topic, in any order, until there is one on each of these topics.

    With a pattern to ask for again: a leaf may not know yet what its hub retains, so whoever misses something
    subscribes once more, as a device does.
    """
    found: dict[str, Delivery] = {}
    deadline, asked = time.monotonic() + seconds, time.monotonic()
    while not found.keys() >= set(wanted):
        assert time.monotonic() < deadline, f"expected {wanted}; found {list(found)}"
        if again and time.monotonic() > asked + 2.0:
            asked = time.monotonic()
            transport.subscribe(again)
        delivery = transport.receive(0.5)
        if delivery is not None:
            delivery.ack()
            found[delivery.topic] = delivery
    return found


def test_what_is_said_at_one_site_is_heard_at_the_other(sites: Sites) -> None:
    server, device = sites.at_hub.connect("server"), sites.at_leaf.connect("device")
    server.subscribe("up/+")
    device.subscribe("down")
    device.publish("up/1", bytes(120_000))
    server.publish("down", b"answer")
    assert len(taken(server, "up/1")["up/1"].payload) == 120_000
    assert taken(device, "down")["down"].payload == b"answer"


def test_what_the_hub_retains_is_retained_at_the_leaf_and_cleared_there(sites: Sites) -> None:
    server, device = sites.at_hub.connect("server"), sites.at_leaf.connect("device")
    for number in range(5):
        server.publish(f"blob/{number}", bytes(120_000), retain=True)
    server.publish("blob/0", b"", retain=True)
    assert server.flush(20)
    device.subscribe("blob/+")
    chunks = {f"blob/{number}" for number in (1, 2, 3, 4)}
    assert set(taken(device, *chunks, again="blob/+")) == chunks
    device.publish("status", b"online", retain=True)
    assert device.flush(20)
    server.subscribe("status")
    assert taken(server, "status")["status"].payload == b"online"


def test_the_hub_keeps_the_session_of_a_device_that_sleeps_at_the_leaf(sites: Sites) -> None:
    server, device = sites.at_hub.connect("server"), sites.at_leaf.connect("device")
    device.subscribe("down")
    device.close()
    server.publish("down", b"while away")
    assert server.flush(20)
    assert taken(sites.at_leaf.connect("device"), "down")["down"].payload == b"while away"


def test_a_link_that_was_cut_costs_time_only(sites: Sites) -> None:
    server, device = sites.at_hub.connect("server"), sites.at_leaf.connect("device")
    server.subscribe("up/+")
    device.subscribe("down")
    sites.line.cut()
    device.publish("up/1", b"into the cut")
    server.publish("down", b"into the cut")
    time.sleep(1.0)
    assert server.receive(0.0) is None
    sites.line.mend()
    assert taken(server, "up/1")["up/1"].payload == b"into the cut"
    assert taken(device, "down")["down"].payload == b"into the cut"


def test_a_leaf_starts_without_its_hub_and_serves_when_it_comes(tmp_path: Path, to_broker: ClientsOf) -> None:
    """A site whose power comes back before its link does."""
    port = free_port()
    with (
        relay(port) as line,
        start("nats", store=tmp_path / "leaf", settings=leaf_settings(line)) as leaf,
        start("nats", store=tmp_path / "hub", settings=Settings(hub_port=port)) as hub,
    ):
        device, server = to_broker(leaf).connect("device"), to_broker(hub).connect("server")
        server.subscribe("up/+")
        device.publish("up/1", b"here")
        taken(server, "up/1")


def test_a_broker_becomes_a_hub_and_keeps_what_it_had(tmp_path: Path, to_broker: ClientsOf) -> None:
    with start("nats", store=tmp_path / "store") as alone:
        client = to_broker(alone).connect("one")
        client.publish("kept", b"retained", retain=True)
        assert client.flush(20)
        client.close()
    port = free_port()
    with (
        start("nats", store=tmp_path / "store", settings=Settings(hub_port=port)) as hub,
        start("nats", store=tmp_path / "leaf", settings=Settings(leaf_of=f"127.0.0.1:{port}")) as leaf,
    ):
        for broker in (hub, leaf):
            client = to_broker(broker).connect("two")
            client.subscribe("kept")
            assert taken(client, "kept")["kept"].payload == b"retained"
            client.close()


@pytest.mark.parametrize("settings", [Settings(hub_port=1), Settings(leaf_of="hub:7422")])
def test_only_nats_makes_hubs_and_leaves(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(ConfigError, match="hubs and leaves are NATS servers; found the broker 'mosquitto'"):
        start("mosquitto", store=tmp_path, settings=settings)
