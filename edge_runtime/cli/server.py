"""`edge-runtime server`: run a fleet until its rounds are merged and its devices have finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_runtime import config as settings
from edge_runtime.cli import shell
from edge_runtime.errors import INTERRUPTED
from server.service import Service
from server.store import Store


def run(broker: str | None, store: Path | None, file: Path | None, overrides: Sequence[str], *, json: bool) -> int:
    """Serve; 0 when the fleet has finished, 130 when interrupted (the same command goes on)."""
    config = shell.with_broker(settings.load(file, overrides), broker)
    shell.check_names(config)
    folder = store or config.server.store
    say = shell.logger("server", as_json=json)
    stop = shell.stop_on_signals()
    disk = Store(folder)
    transport = shell.connect(config, f"edge-{config.fleet.name}-server", say, stop)
    try:
        service = Service(config, transport, disk, say=say, record=shell.recorder(folder / "metrics.jsonl"))
        end = service.run(stop)
    finally:
        transport.close()
        disk.close()
    if end.phase != "over":
        say("interrupted; the store is kept, the same command goes on from there")
        return INTERRUPTED
    return 0
