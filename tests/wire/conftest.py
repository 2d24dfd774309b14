"""Real brokers on free loopback ports, and the same three verbs over every transport."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from edge_runtime.errors import BrokerError
from edge_runtime.wire.broker import BROKERS, EmbeddedBroker, Settings, start
from edge_runtime.wire.memory import MemoryBroker, MemoryTransport
from edge_runtime.wire.mqtt import MqttTransport, connect
from edge_runtime.wire.transport import Transport, Will

# NATS sends what is unacknowledged again only after this long, so tests that wait for it want it short.
QUICK = Settings(ack_wait_s=2.0)

StartBroker = Callable[..., EmbeddedBroker]


def require(kind: str) -> None:
    """Skip where a broker is not installed, but never in CI, where that would hide a hole."""
    try:
        BROKERS[kind].find()
    except BrokerError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI runs against both brokers: {error}")
        pytest.skip(str(error))


@pytest.fixture
def start_broker(tmp_path: Path) -> Iterator[StartBroker]:
    """Start brokers that are stopped after the test, however it ends."""
    started: list[EmbeddedBroker] = []

    def begin(kind: str, *, store: str = "store", settings: Settings = QUICK) -> EmbeddedBroker:
        require(kind)
        started.append(start(kind, store=tmp_path / f"{kind}-{store}", settings=settings))
        return started[-1]

    yield begin
    for broker in started:
        broker.stop()


@pytest.fixture
def nats_broker(start_broker: StartBroker) -> EmbeddedBroker:
    """A NATS server."""
    return start_broker("nats")


@pytest.fixture
def mosquitto_broker(start_broker: StartBroker) -> EmbeddedBroker:
    """A Mosquitto."""
    return start_broker("mosquitto")


@pytest.fixture(params=["nats", "mosquitto"])
def any_broker(request: pytest.FixtureRequest, start_broker: StartBroker) -> EmbeddedBroker:
    """Each of the real brokers in turn."""
    return start_broker(request.param)


@dataclass
class Clients:
    """Connections to one broker; all are closed after the test.

    Attributes:
        kind: "memory", or the broker's kind.
        make: connects one client.
        open: the connections made.
        events: what the real transports said.
    """

    kind: str
    make: Callable[[str, Will | None], Transport]
    open: list[Transport] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    def connect(self, client_id: str, will: Will | None = None) -> Transport:
        """One more client."""
        self.open.append(self.make(client_id, will))
        return self.open[-1]

    def cut(self, transport: Transport) -> None:
        """Break a connection as a network does; the real transport comes back by itself, the twin by `resume`."""
        if isinstance(transport, MemoryTransport):
            transport.drop()
        elif isinstance(transport, MqttTransport):
            line = transport._client.socket()
            assert isinstance(line, socket.socket)
            line.shutdown(socket.SHUT_RDWR)

    def mend(self, transport: Transport, sessions: int) -> None:
        """Wait until a transport has had as many sessions."""
        if isinstance(transport, MemoryTransport):
            transport.resume()
        elif isinstance(transport, MqttTransport):
            with transport._changed:
                transport._changed.wait_for(lambda: transport.sessions >= sessions, 20)
        assert transport.sessions == sessions

    def close(self) -> None:
        """Close them all."""
        for transport in self.open:
            transport.close()


@pytest.fixture
def to_broker() -> Iterator[Callable[[EmbeddedBroker], Clients]]:
    """Clients of a given broker."""
    made: list[Clients] = []

    def clients_of(broker: EmbeddedBroker) -> Clients:
        events: list[str] = []

        def make(client_id: str, will: Will | None) -> Transport:
            return connect(broker.address, client_id, will=will, on_event=events.append, random=Random(0), patience=20)

        made.append(Clients(broker.kind, make, events=events))
        return made[-1]

    yield clients_of
    for clients in made:
        clients.close()


@pytest.fixture(
    params=[
        "memory",
        pytest.param("nats", marks=pytest.mark.broker),
        pytest.param("mosquitto", marks=pytest.mark.broker),
    ]
)
def clients(
    request: pytest.FixtureRequest, start_broker: StartBroker, to_broker: Callable[[EmbeddedBroker], Clients]
) -> Iterator[Clients]:
    """Clients of the twin, and of each of the real brokers."""
    if request.param == "memory":
        twin = MemoryBroker()
        clients = Clients("memory", lambda client_id, will: twin.connect(client_id, will=will))
    else:
        clients = to_broker(start_broker(request.param))
    yield clients
    clients.close()
