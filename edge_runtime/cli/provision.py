"""`edge-runtime provision`: the keys, certificates and rules of a fleet, one folder for each machine."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edge_runtime.errors import ConfigError
from edge_runtime.provision.authority import AUTHORITY_DAYS, CERTIFICATE_DAYS, RENEW_BELOW_DAYS
from edge_runtime.provision.bundle import Order, Outcome, provision, revoke


def run(order: Order, revoked: str | None, why: str) -> int:
    """Make what is missing, or revoke a device; show what there is and what to do next.

    Raises:
        ConfigError: a name that cannot be, or no such device.
    """
    console = Console(highlight=False, soft_wrap=True)
    before = os.umask(0o077)
    try:
        outcome = _done(order, revoked, why)
    finally:
        os.umask(before)
    console.print(_table(outcome))
    console.print(
        f"certificates: {CERTIFICATE_DAYS} days, authority {AUTHORITY_DAYS} days; provision again within the last "
        f"{RENEW_BELOW_DAYS} days of one to renew it"
    )
    for line in _next(order.folder, outcome, revoked):
        console.print(line)
    return 0


def _done(order: Order, revoked: str | None, why: str) -> Outcome:
    if revoked is None:
        return provision(order)
    if order.devices or order.renew:
        raise ConfigError("--revoke takes a device out; give --devices or --renew in a command of their own")
    return revoke(order.folder, revoked, why)


def _table(outcome: Outcome) -> Table:
    table = Table("", "", "certificate until", "folder", title=f"fleet '{outcome.fleet}'", title_justify="left")
    for row in outcome.rows:
        mark = "new" if row.name in outcome.made else ""
        table.add_row(f"{row.name} {mark}".strip(), row.standing, f"{row.expires:%Y-%m-%d}", _short(row.folder))
    return table


def _next(folder: Path, outcome: Outcome, revoked: str | None) -> list[str]:
    """The commands that follow."""
    if revoked is not None:
        return [
            f"a running server refuses '{revoked}' from now on",
            f"copy {folder}/broker to the broker and restart it, so that it refuses the certificate too",
        ]
    new = [row for row in outcome.rows if row.name in outcome.made and row.folder.parent.name == "devices"]
    scp = [f"scp -rp {_short(row.folder)} {row.name}:" for row in new]
    return [
        "next:",
        f"  edge-runtime broker --host 0.0.0.0 --port {outcome.broker.port} --provisioned {folder}/broker",
        f"  or, instead of it: mosquitto -c {folder}/broker/mosquitto.conf",
        f"  edge-runtime server --config {folder}/server/fleet.toml",
        *(f"  {line}" for line in scp),
        "  on each device: edge-runtime client --config NAME/fleet.toml --data FILE.jsonl",
        f"keep {folder}/authority to yourself: whoever has ca.key can let anybody in",
    ]


def _short(path: Path) -> str:
    """A path as seen from here, where that is shorter."""
    near = os.path.relpath(path)
    return near if len(near) < len(str(path)) else str(path)
