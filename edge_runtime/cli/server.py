"""`edge-runtime server`: run a fleet until its rounds are merged and its devices have finished."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from edge_runtime import config as settings
from edge_runtime.cli import guards, shell
from edge_runtime.errors import INTERRUPTED
from server.service import Service
from server.store import Store


def run(
    broker: str | None, store: Path | None, file: Path | None, overrides: Sequence[str], *, insecure: bool, json: bool
) -> int:
    """Serve; 0 when the fleet has finished, 130 when interrupted (the same command goes on)."""
    config = guards.with_insecure(shell.with_broker(settings.load(file, overrides), broker), insecure)
    shell.check_names(config)
    folder = store or config.server.store
    say = shell.logger("server", as_json=json)
    stop = shell.stop_on_signals()
    with ExitStack() as closing:
        guard = closing.enter_context(guards.of_server(config))
        disk = Store(folder)
        closing.callback(disk.close)
        transport = shell.connect(config, f"edge-{config.fleet.name}-server", say, stop)
        closing.callback(transport.close)
        record = shell.recorder(folder / "metrics.jsonl")
        service = Service(config, transport, disk, say=say, record=record, guard=guard)
        end = service.run(stop)
    if end.phase != "over":
        say("interrupted; the store is kept, the same command goes on from there")
        return INTERRUPTED
    return 0
