"""What only a network can do: refuse, be slow, be cut, be encrypted. Over real brokers."""

from __future__ import annotations

import hashlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from threading import Thread

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import BrokerError, ConfigError, TooLargeError
from edge_runtime.wire.broker import EmbeddedBroker, Settings
from edge_runtime.wire.link import FIRST_DELAY_S, LONGEST_DELAY_S, backoff
from edge_runtime.wire.mqtt import LARGEST_PAYLOAD, WINDOW_MESSAGES, BrokerAddress, connect
from tests.strategies import laws
from tests.wire.conftest import Clients, StartBroker

ROOT = Path(__file__).parents[2]
CHUNK = 120 * 1024

ClientsOf = Callable[[EmbeddedBroker], Clients]


def quiet(_event: str) -> None:
    """Take no note of an event."""


@pytest.fixture
def free_port() -> int:
    """A loopback port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@laws
@given(st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_the_wait_doubles_up_to_a_limit_and_is_half_chance(attempt: int, random: Random) -> None:
    """No wait is longer than the limit, and none shorter than half of what its attempt calls for."""
    ceiling = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** min(attempt, 100))
    assert ceiling / 2 <= backoff(attempt, random) <= ceiling


def test_an_unreachable_broker_is_tried_again_until_patience_ends(free_port: int) -> None:
    """The error says where and why, and each attempt was told."""
    events: list[str] = []
    with pytest.raises(BrokerError, match=rf"no broker at 127\.0\.0\.1:{free_port} within 1 s: .*refused.*; check"):
        connect(BrokerAddress("127.0.0.1", free_port), "c", on_event=events.append, random=Random(0), patience=1.0)
    assert len(events) >= 2
    assert all("unreachable (Connection refused); trying again in" in event for event in events)


def test_a_host_that_takes_connections_and_says_nothing_is_no_broker() -> None:
    """Patience ends there too."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = BrokerAddress("127.0.0.1", silent.getsockname()[1])
        with pytest.raises(BrokerError, match="did not answer"):
            connect(address, "c", on_event=quiet, random=Random(0), patience=0.5)


@pytest.mark.broker
def test_a_client_that_comes_first_waits_for_its_broker(nats_broker: EmbeddedBroker) -> None:
    """The first connection is tried again like any other."""
    nats_broker.stop()
    events: list[str] = []
    transports = []

    def first() -> None:
        transports.append(connect(nats_broker.address, "c", on_event=events.append, random=Random(0), patience=20))

    waiting = Thread(target=first)
    waiting.start()
    while not events:
        waiting.join(0.01)
    nats_broker.start()
    waiting.join()
    assert transports[0].connected
    assert "refused" in events[0]
    assert events[-1].startswith("connected")
    transports[0].close()


@pytest.fixture(params=["nats", "mosquitto"])
def guarded_broker(request: pytest.FixtureRequest, start_broker: StartBroker, tmp_path: Path) -> EmbeddedBroker:
    """A broker that knows one user."""
    if request.param == "nats":
        lines = ['authorization { user: "device", password: "right" }']
    else:
        passwords = tmp_path / "passwords"
        program = shutil.which("mosquitto_passwd")
        if program is not None:
            subprocess.run([program, "-b", "-c", str(passwords), "device", "right"], check=True)
        lines = ["allow_anonymous false", f"password_file {passwords}"]
    return start_broker(request.param, settings=Settings(listener_lines=lines))


@pytest.mark.broker
@pytest.mark.parametrize("password", ["wrong", None])
def test_a_refusal_is_final(guarded_broker: EmbeddedBroker, password: str | None) -> None:
    """Wrong credentials are not tried again, however patient the caller is."""
    host, port = guarded_broker.address.host, guarded_broker.address.port
    user = None if password is None else "device"
    events: list[str] = []
    with pytest.raises(BrokerError, match=f"broker at {host}:{port} refused us: .*password"):
        connect(BrokerAddress(host, port, user, password), "c", on_event=events.append, random=Random(0))
    assert len(events) == 1
    right = connect(BrokerAddress(host, port, "device", "right"), "c", on_event=quiet, random=Random(0))
    assert right.connected
    right.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that is its own authority, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
    name = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", *kind, *name, "-out", str(cert), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


@pytest.mark.broker
@pytest.mark.parametrize("kind", ["nats", "mosquitto"])
def test_tls_verifies_both_ends(kind: str, start_broker: StartBroker, certificate: tuple[Path, Path]) -> None:
    """The known certificate is let in; a client without one, and a broker that we do not trust, are not."""
    cert, key = certificate
    lines = {
        "nats": [f'tls {{ cert_file: "{cert}", key_file: "{key}", ca_file: "{cert}", verify: true }}'],
        "mosquitto": [
            "allow_anonymous true",
            f"certfile {cert}",
            f"keyfile {key}",
            f"cafile {cert}",
            "require_certificate true",
        ],
    }[kind]
    at = start_broker(kind, settings=Settings(listener_lines=lines)).address
    known = BrokerAddress(at.host, at.port, tls_ca=cert, tls_cert=cert, tls_key=key)
    one = connect(known, "one", on_event=quiet, random=Random(0), patience=20)
    one.subscribe("a")
    one.publish("a", bytes(10 * CHUNK))
    delivery = one.receive(10)
    assert delivery is not None
    assert len(delivery.payload) == 10 * CHUNK
    one.close()
    with pytest.raises(BrokerError, match="it wants a certificate of this client"):
        connect(BrokerAddress(at.host, at.port, tls_ca=cert), "two", on_event=quiet, random=Random(0), patience=20)
    with pytest.raises(BrokerError, match=r"which the authorities of this system did not sign"):
        connect(BrokerAddress(at.host, at.port, tls=True), "three", on_event=quiet, random=Random(0), patience=20)


def test_an_address_that_cannot_be_is_a_configuration_error(tmp_path: Path) -> None:
    """Each message names the value, and no password is ever shown."""
    with pytest.raises(ConfigError, match="70000"):
        BrokerAddress("broker", 70_000)
    with pytest.raises(ConfigError, match="tls_cert beside tls_key"):
        BrokerAddress("broker", tls_key=tmp_path / "key.pem")
    with pytest.raises(ConfigError, match=r"absent\.pem"):
        connect(BrokerAddress("broker", tls_ca=tmp_path / "absent.pem"), "c", on_event=quiet, random=Random(0))
    for name in ("", "a/b", "a" * 129, "a#"):
        with pytest.raises(ConfigError, match="client id"):
            connect(BrokerAddress("broker"), name, on_event=quiet, random=Random(0))
    assert BrokerAddress("broker", client_prefix="edge-").client_id("pi") == "edge-pi"
    assert "secret" not in repr(BrokerAddress("broker", username="u", password="secret"))  # noqa: S106 - to look for it


@pytest.mark.broker
def test_many_large_messages_arrive_complete(any_broker: EmbeddedBroker, to_broker: ClientsOf) -> None:
    """Four publishers, 50 chunks of 120 KiB each: the digest of every one is that of what was sent."""
    clients = to_broker(any_broker)
    subscriber = clients.connect("subscriber")
    subscriber.subscribe("chunk/#")
    expected: dict[str, str] = {}

    def publish(name: int) -> None:
        transport = clients.connect(f"publisher{name}")
        random = Random(name)
        for n in range(50):
            payload = random.randbytes(CHUNK)
            expected[f"chunk/{name}/{n}"] = hashlib.sha256(payload).hexdigest()
            transport.publish(f"chunk/{name}/{n}", payload)
        assert transport.flush(30)

    threads = [Thread(target=publish, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    found: dict[str, str] = {}
    count = 0
    while len(found) < 200 and (delivery := subscriber.receive(20)) is not None:
        found[delivery.topic] = hashlib.sha256(delivery.payload).hexdigest()
        count += 1
        delivery.ack()
    for thread in threads:
        thread.join()
    assert found == expected
    assert count == 200


@pytest.fixture
def frozen_broker(any_broker: EmbeddedBroker) -> Iterator[EmbeddedBroker]:
    """A broker that a test may stop with SIGSTOP; it goes on afterwards."""
    yield any_broker
    psutil.Process(any_broker.pid).resume()


def freeze(broker: EmbeddedBroker) -> None:
    """Stop a broker's threads, all of them, and return when they stand."""
    process = psutil.Process(broker.pid)
    process.suspend()
    while any(psutil.Process(thread.id).status() != psutil.STATUS_STOPPED for thread in process.threads()):
        continue


@pytest.mark.broker
@pytest.mark.parametrize(("size", "room"), [(100, WINDOW_MESSAGES), (7 * 2**20, 2)])
def test_publishing_waits_for_a_broker_that_does_not_keep_up(
    frozen_broker: EmbeddedBroker, to_broker: ClientsOf, size: int, room: int
) -> None:
    """The window holds 64 messages or 16 MiB; the next one waits until there is room."""
    clients = to_broker(frozen_broker)
    one, two = clients.connect("one"), clients.connect("two")
    two.subscribe("a")
    freeze(frozen_broker)
    for _ in range(room):
        one.publish("a", bytes(size))
    beyond = Thread(target=one.publish, args=("a", bytes(size)))
    beyond.start()
    beyond.join(0.3)
    assert beyond.is_alive()
    assert one.bytes_sent == room * (size + 1)
    assert not one.flush(0)
    psutil.Process(frozen_broker.pid).resume()
    beyond.join(20)
    assert one.flush(20)
    for _ in range(room + 1):
        delivery = two.receive(20)
        assert delivery is not None
        delivery.ack()


@pytest.mark.broker
def test_closing_wakes_a_publisher_that_waits(frozen_broker: EmbeddedBroker, to_broker: ClientsOf) -> None:
    """It gets the error that says so."""
    one = to_broker(frozen_broker).connect("one")
    freeze(frozen_broker)
    ended: list[BrokerError] = []

    def publish() -> None:
        try:
            for _ in range(WINDOW_MESSAGES + 1):
                one.publish("a", b"")
        except BrokerError as error:
            ended.append(error)

    publishing = Thread(target=publish)
    publishing.start()
    publishing.join(0.2)
    one.close()
    publishing.join(10)
    assert len(ended) == 1


@pytest.mark.broker
def test_a_message_that_brokers_refuse_is_refused_before_it_is_sent(
    any_broker: EmbeddedBroker, to_broker: ClientsOf
) -> None:
    """The largest one arrives; a larger one, at which brokers hang up, never leaves."""
    one = to_broker(any_broker).connect("one")
    one.subscribe("a")
    one.publish("a", bytes(LARGEST_PAYLOAD))
    delivery = one.receive(20)
    assert delivery is not None
    assert len(delivery.payload) == LARGEST_PAYLOAD
    with pytest.raises(TooLargeError, match=str(LARGEST_PAYLOAD + 1)):
        one.publish("a", bytes(LARGEST_PAYLOAD + 1))
    assert one.sessions == 1


@pytest.mark.broker
def test_a_refused_subscription_is_told(start_broker: StartBroker, to_broker: ClientsOf) -> None:
    """Here because the subscriptions of a session exceed what NATS can track; the connection lives on."""
    clients = to_broker(start_broker("nats", settings=Settings(max_ack_pending=40_000)))
    one = clients.connect("one")
    one.subscribe("a")
    one.subscribe("b")
    assert [event for event in clients.events if "refused the subscription to 'b'" in event]
    one.publish("a", b"still here")
    delivery = one.receive(10)
    assert delivery is not None
    assert delivery.payload == b"still here"


DYING = """
import sys
from random import Random
from edge_runtime.wire.mqtt import BrokerAddress, connect
from edge_runtime.wire.transport import Will

address = BrokerAddress("127.0.0.1", int(sys.argv[1]))
transport = connect(address, "dying", will=Will("status", b"offline"), on_event=print, random=Random(0))
transport.publish("status", b"online", retain=True)
print("flushed", transport.flush(10), flush=True)
sys.stdin.read()
"""


@pytest.mark.broker
def test_a_killed_process_leaves_its_will(any_broker: EmbeddedBroker, to_broker: ClientsOf) -> None:
    """SIGKILL gives a client no time for anything: the broker speaks for it."""
    watcher = to_broker(any_broker).connect("watcher")
    watcher.subscribe("status")
    command = [sys.executable, "-c", DYING, str(any_broker.address.port)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(2)]
        process.kill()
    assert said[1] == "flushed True\n"
    payloads = []
    for _ in range(2):
        delivery = watcher.receive(20)
        assert delivery is not None
        delivery.ack()
        payloads.append(delivery.payload)
    assert payloads == [b"online", b"offline"]


@pytest.mark.broker
def test_two_clients_of_one_name_are_told_what_is_wrong(nats_broker: EmbeddedBroker, to_broker: ClientsOf) -> None:
    """They evict each other; after a few times the event asks for the reason."""
    clients = to_broker(nats_broker)
    clients.connect("same")
    other = clients.connect("same")
    for _ in range(200):
        if any("same client id" in event for event in clients.events):
            break
        other.receive(0.1)
    assert any("does another process use the same client id?" in event for event in clients.events)
