"""The embedded brokers: what survives their end, and what is said when they cannot begin."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from threading import Thread

import psutil
import pytest

from edge_runtime.errors import BrokerError, ConfigError, MissingExtraError
from edge_runtime.wire.broker import BROKERS, EmbeddedBroker, Settings, start
from edge_runtime.wire.transport import Transport
from tests.wire.conftest import Clients, StartBroker

pytestmark = pytest.mark.broker

ROOT = Path(__file__).parents[2]

ClientsOf = Callable[[EmbeddedBroker], Clients]


def take(transport: Transport, count: int) -> list[bytes]:
    """The payloads of the next `count` deliveries, acknowledged."""
    payloads: list[bytes] = []
    for _ in range(count):
        delivery = transport.receive(20)
        assert delivery is not None, f"only {len(payloads)} of {count} arrived"
        delivery.ack()
        payloads.append(delivery.payload)
    return payloads


def test_nats_keeps_queued_and_retained_messages_when_it_is_killed(
    nats_broker: EmbeddedBroker, to_broker: ClientsOf
) -> None:
    """SIGKILL, and a start on the same store: the session, its queue and what was retained are there."""
    clients = to_broker(nats_broker)
    one, away = clients.connect("one"), clients.connect("away")
    away.subscribe("queue")
    away.close()
    for n in range(100):
        one.publish("queue", str(n).encode())
    one.publish("kept", b"retained", retain=True)
    assert one.flush(20)
    nats_broker.kill()
    assert not nats_broker.running
    nats_broker.start()
    back = clients.connect("away")
    assert sorted(int(payload) for payload in take(back, 100)) == list(range(100))
    back.subscribe("kept")
    assert take(back, 1) == [b"retained"]


def test_publishers_and_subscribers_live_through_a_killed_nats(
    nats_broker: EmbeddedBroker, to_broker: ClientsOf
) -> None:
    """Killed in the middle of a stream: every message arrives, by reconnecting and sending again."""
    clients = to_broker(nats_broker)
    one, two = clients.connect("one"), clients.connect("two")
    two.subscribe("stream/+")

    def publish() -> None:
        for n in range(400):
            one.publish(f"stream/{n}", bytes(20_000))

    publishing = Thread(target=publish)
    found: set[str] = set()
    publishing.start()
    while len(found) < 400:
        delivery = two.receive(20)
        assert delivery is not None, f"only {len(found)} of 400 arrived"
        delivery.ack()
        found.add(delivery.topic)
        if len(found) == 100 and nats_broker.running and one.sessions == 1:
            nats_broker.kill()
            nats_broker.start()
    publishing.join()
    assert one.flush(20)
    assert (one.sessions, two.sessions) == (2, 2)


def test_an_orderly_stop_keeps_everything(any_broker: EmbeddedBroker, to_broker: ClientsOf) -> None:
    """Both brokers bring queue, session and retained messages back, on the same port."""
    clients = to_broker(any_broker)
    one, away = clients.connect("one"), clients.connect("away")
    away.subscribe("queue")
    away.close()
    one.publish("queue", b"queued")
    one.publish("kept", b"retained", retain=True)
    assert one.flush(20)
    any_broker.stop()
    assert not any_broker.running
    any_broker.start()
    back = clients.connect("away")
    assert take(back, 1) == [b"queued"]
    back.subscribe("kept")
    assert take(back, 1) == [b"retained"]


def test_a_broker_listens_on_loopback_only(any_broker: EmbeddedBroker) -> None:
    """Also NATS's listener of its own protocol, which cannot be left out."""
    ports = [c.laddr for c in psutil.Process(any_broker.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert any_broker.address.port in {address.port for address in ports}
    assert {address.ip for address in ports} == {"127.0.0.1"}


@pytest.mark.parametrize("kind", ["nats", "mosquitto"])
def test_the_context_ends_the_broker(kind: str, start_broker: StartBroker) -> None:
    """Whatever happens inside."""
    broker = start_broker(kind)

    def fail() -> None:
        with broker:
            raise KeyError

    assert broker.running
    with pytest.raises(KeyError):
        fail()
    assert [broker.running] == [False]
    broker.stop()


def test_one_store_serves_one_broker(nats_broker: EmbeddedBroker) -> None:
    """Two servers on one store would spoil it; the second is told which process is in the way."""
    with pytest.raises(BrokerError, match=rf"process {nats_broker.pid}, uses the store"):
        start("nats", store=nats_broker.store, patience=0.2)
    with pytest.raises(BrokerError, match="already running"):
        nats_broker.start()
    nats_broker.stop()
    with start("nats", store=nats_broker.store) as second:
        assert second.running


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    """And the program that uses it is never taken for the broker."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(BrokerError, match=rf"cannot listen at 127\.0\.0\.1:{port} \(Address already in use\)"):
            start("nats", store=tmp_path / "store", port=port)
    with pytest.raises(BrokerError, match="cannot listen at no-such-host"):
        start("nats", store=tmp_path / "store", host="no-such-host.invalid")


@pytest.mark.parametrize(
    ("kind", "line", "said"), [("nats", 'ping_interval: "soon"', "soon"), ("mosquitto", "nonsense true", "nonsense")]
)
def test_a_broker_that_does_not_start_shows_its_log(kind: str, line: str, said: str, start_broker: StartBroker) -> None:
    """Here because of a configuration that it does not understand."""
    with pytest.raises(BrokerError, match=rf"the {kind} broker ended with code \d+ .*broker\.log: .*{said}"):
        start_broker(kind, settings=Settings(other_lines=[line]))


def test_an_unknown_kind_lists_the_known(tmp_path: Path) -> None:
    """A name that is no row of the table."""
    with pytest.raises(ConfigError, match="unknown broker 'rabbit'; expected one of: mosquitto, nats"):
        start("rabbit", store=tmp_path)


def test_a_missing_program_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """NATS comes with an extra, Mosquitto from the system."""

    def absent(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(MissingExtraError, match=r"edge-runtime\[broker\]"):
        start("nats", store=tmp_path)
    with pytest.raises(BrokerError, match="apt-get install mosquitto"):
        start("mosquitto", store=tmp_path)


def test_a_server_on_the_path_serves_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever installed nats-server otherwise need not install it twice."""
    packaged = BROKERS["nats"].find()
    (tmp_path / "nats-server").symlink_to(packaged)

    def absent(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert BROKERS["nats"].find() == tmp_path / "nats-server"


ORPHANING = """
import json, os, sys
from pathlib import Path
from edge_runtime.wire.broker import start

broker = start("nats", store=Path(sys.argv[1]))
print(json.dumps([broker.pid, broker.address.port]), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_broker_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    """So that whoever was killed can start again on the same store."""
    store = tmp_path / "store"
    command = [sys.executable, "-c", ORPHANING, str(store)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid, port = json.loads(process.stdout.readline())
        assert psutil.pid_exists(pid)
        os.kill(process.pid, signal.SIGKILL)
    with start("nats", store=store, port=port) as again:
        assert again.running
        assert again.pid != pid
