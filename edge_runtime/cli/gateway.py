"""`edge-runtime gateway`: serve the devices of a site, and be one device of the fleet above."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from edge_runtime import config as settings
from edge_runtime.cli import guards, shell
from edge_runtime.config import Config
from edge_runtime.errors import INTERRUPTED, ConfigError
from edge_runtime.gateway.gateway import Gateway
from edge_runtime.gateway.subtree import Subtree, method_of
from edge_runtime.identity import Identity, instance_of, will
from edge_runtime.state import DeviceState
from edge_runtime.wire.messages import Directive
from server.store import Store


def run(
    upstream: Path,
    name: str | None,
    store: Path | None,
    file: Path | None,
    overrides: Sequence[str],
    *,
    insecure: bool,
    json: bool,
) -> int:
    """Take part above and serve below until both fleets have finished; 130 when interrupted."""
    config = guards.with_insecure(settings.load(file, overrides), insecure)
    above = guards.with_insecure(shell.with_device(settings.load(upstream), {"name": name}, None), insecure)
    _check(config, above)
    folder, fleet, called = store or config.server.store, above.fleet.name, shell.device_name(above)
    say = shell.logger(f"gateway {called}", as_json=json)
    stop = shell.stop_on_signals()
    with ExitStack() as closing:
        disk = DeviceState(above.device.state_dir)
        closing.callback(disk.close)
        record = shell.recorder(folder / "metrics.jsonl")
        server_guard = closing.enter_context(guards.of_server(config))
        guard = closing.enter_context(guards.of_device(above))
        identity = Identity(fleet, called, above.wire.chunk_bytes, instance_of(disk), guard, above.device.round_bytes)
        last_will = will(fleet, called, guard, identity.instance)
        below = shell.connect(config, f"edge-{config.fleet.name}-server", say, stop)
        closing.callback(below.close)
        transport = shell.connect(above, f"edge-{fleet}-{called}", say, stop, last_will)
        closing.callback(transport.close)
        guards.enrol(above, called, transport, guard, say, stop)

        def subtree(life: str, directive: Directive) -> Subtree:
            return Subtree(
                config, directive, below, Store(folder / life), say=say, record=record, clock=time.monotonic,
                guard=server_guard,
            )  # fmt: skip

        gateway = Gateway(
            identity, config, transport=transport, state=disk, subtree=subtree, say=say, record=record,
            clock=time.monotonic,
        )  # fmt: skip
        gateway.run(stop)
    if not gateway.left:
        say("interrupted; both stores are kept, the same command goes on from there")
        return INTERRUPTED
    return 0


def _check(config: Config, above: Config) -> None:
    """Refuse what can be known to be wrong before anything is opened or waited for.

    Raises:
        ConfigError: both files are of one fleet, or the site's method has no increments.
    """
    shell.check_names(config)
    method_of(config, lambda _: None)
    here, there = ((each.broker.host, each.broker.port, each.fleet.name) for each in (config, above))
    if here == there:
        raise ConfigError(
            f"a gateway stands between two fleets; both files name '{config.fleet.name}' at "
            f"{config.broker.host}:{config.broker.port}; give the site's fleet another [fleet] name, or its own broker"
        )
