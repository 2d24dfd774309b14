"""A provisioned fleet on real brokers that keep its rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from edge_runtime.errors import BrokerError
from edge_runtime.provision import rules
from edge_runtime.provision.bundle import Order, provision
from edge_runtime.wire.broker import EmbeddedBroker, start
from edge_runtime.wire.mqtt import BrokerAddress, connect
from edge_runtime.wire.transport import Delivery, Transport, Will
from tests.wire.conftest import require

FLEET = "fleet"


@dataclass
class Secured:
    """A broker with a provisioned fleet's rules, and connections to it.

    Attributes:
        place: the fleet's folder.
        broker: the process.
        open: the connections made.
        events: what they said.
    """

    place: Path
    broker: EmbeddedBroker
    open: list[Transport] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    def address(self, who: str, **changes: Any) -> BrokerAddress:
        """How a machine of the fleet reaches the broker with what its folder holds."""
        folder = self.place / (who if who == "server" else f"devices/{who}")
        facts: dict[str, Any] = {
            "host": "localhost",
            "tls_ca": folder / "ca.crt",
            "tls_cert": folder / "tls.crt",
            "tls_key": folder / "tls.key",
        }
        return BrokerAddress(port=self.broker.address.port, **(facts | changes))

    def connect(self, who: str, will: Will | None = None, client_id: str = "", **changes: Any) -> Transport:
        """A connection with a machine's certificate."""
        name = client_id or f"edge-{FLEET}-{who}"
        address = self.address(who, **changes)
        transport = connect(address, name, on_event=self.events.append, random=Random(0), patience=20, will=will)
        self.open.append(transport)
        return transport

    def refused(self, who: str, **changes: Any) -> str:
        """Why a connection does not come about."""
        with pytest.raises(BrokerError) as caught:
            self.connect(who, **changes)
        return str(caught.value)

    def restart(self) -> None:
        """Stop the broker, and start it with the rules as they are now."""
        self.broker.stop()
        self.broker._settings = rules.settings(self.broker.kind, self.place / "broker")
        self.broker.start()


def taken(transport: Transport, patience: float = 1.0) -> list[Delivery]:
    """What arrives until nothing has for a while."""
    found = []
    while (delivery := transport.receive(patience)) is not None:
        delivery.ack()
        found.append(delivery)
    return found


@pytest.fixture(params=["mosquitto", "nats"])
def secured(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Secured]:
    """Each of the real brokers in turn."""
    require(request.param)
    place = tmp_path / "fleet"
    provision(Order(place, fleet=FLEET, devices=("a", "b")))
    settings = rules.settings(request.param, place / "broker")
    with start(request.param, store=tmp_path / "store", settings=settings) as broker:
        found = Secured(place, broker)
        yield found
        for transport in found.open:
            transport.close()
