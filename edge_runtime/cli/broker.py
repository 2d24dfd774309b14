"""`edge-runtime broker`: the embedded broker, alone."""

from __future__ import annotations

import time
from pathlib import Path

from edge_runtime.cli import guards, shell
from edge_runtime.errors import BrokerError
from edge_runtime.provision import rules
from edge_runtime.wire import broker as embedded


def run(kind: str, host: str, port: int, store: Path, provisioned: Path | None, *, insecure: bool) -> int:
    """Serve until Ctrl-C or SIGTERM; what was published and retained is kept in the store.

    Raises:
        BrokerError: it did not start, or ended by itself.
        ConfigError: it would serve other machines without certificates and rules.
    """
    say = shell.logger("broker", as_json=False)
    stop = shell.stop_on_signals()
    guards.check_listener(host, provisioned=provisioned is not None, insecure=insecure)
    settings = rules.settings(kind, provisioned.resolve()) if provisioned else None
    with embedded.start(kind, store=store, host=host, port=port, settings=settings) as served:
        say(f"{kind} serves MQTT on {served.address}; state in {store}; Ctrl-C ends it")
        while not stop() and served.running:
            time.sleep(0.5)
        if not stop():
            raise BrokerError(f"the {kind} broker ended by itself; see {store / embedded.LOG}, then start it again")
    return 0
