"""`edge-runtime broker`: the embedded broker, alone."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from edge_runtime.cli import guards, shell
from edge_runtime.errors import BrokerError, ConfigError
from edge_runtime.provision import rules
from edge_runtime.wire import broker as embedded


@dataclass(frozen=True)
class Order:
    """Which broker to run.

    Attributes:
        kind: nats or mosquitto.
        host: address to listen on.
        port: TCP port.
        store: folder of its durable state.
        provisioned: a provisioned fleet's folder of certificates and rules; None for none.
        hub: be a hub, whose leaves connect to this port.
        leaf_of: be a leaf of the hub at HOST:PORT.
    """

    kind: str
    host: str
    port: int
    store: Path
    provisioned: Path | None = None
    hub: int | None = None
    leaf_of: str | None = None


def run(order: Order, *, insecure: bool) -> int:
    """Serve until Ctrl-C or SIGTERM; what was published and retained is kept in the store, or by a leaf's hub.

    Raises:
        BrokerError: it did not start, or ended by itself.
        ConfigError: not an address, a broker that knows no hubs and leaves, or one that would serve other machines
            without certificates and rules.
    """
    leaf_of = order.leaf_of
    if leaf_of is not None and not _is_address(leaf_of):
        raise ConfigError(f"--leaf-of takes the hub's HOST:PORT for leaves; found {leaf_of!r}")
    say = shell.logger("broker", as_json=False)
    stop = shell.stop_on_signals()
    # Certificates and rules are those of MQTT's listener: what joins hub and leaf has none.
    alone = order.hub is None and leaf_of is None
    guards.check_listener(order.host, provisioned=alone and order.provisioned is not None, insecure=insecure)
    settings = rules.settings(order.kind, order.provisioned.resolve()) if order.provisioned else embedded.Settings()
    settings = replace(settings, hub_port=order.hub, leaf_of=order.leaf_of)
    with embedded.start(order.kind, store=order.store, host=order.host, port=order.port, settings=settings) as served:
        kept = f"state in {order.store}" if leaf_of is None else f"everything is kept by the hub at {leaf_of}"
        leaves = "" if order.hub is None else f"; leaves connect to port {order.hub}"
        say(f"{order.kind} serves MQTT on {served.address}{leaves}; {kept}; Ctrl-C ends it")
        while not stop() and served.running:
            time.sleep(0.5)
        if not stop():
            raise BrokerError(
                f"the {order.kind} broker ended by itself; see {order.store / embedded.LOG}, then start it again"
            )
    return 0


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdigit() and 0 < int(port) < 65536
