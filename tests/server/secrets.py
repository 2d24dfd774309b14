"""The keys of a small fleet, and guards made of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_runtime.wire.guard import DeviceGuard, Guard
from edge_runtime.wire.keys import SigningKey
from edge_runtime.wire.ledger import Ledger
from server import roster as rosters
from server.guard import ServerGuard
from server.roster import Entry, Roster, RosterFile

FLEET = "fleet"


class Secrets:
    """Keys of a server and of devices, their roster, and a ledger for each of them, in a folder."""

    def __init__(self, folder: Path, *names: str, fleet: str = FLEET) -> None:
        self.fleet = fleet
        self.folder, self.now = folder, 1_790_000_000_000_000
        self.server = SigningKey.from_seed(b"s" * 32)
        self.devices = {name: SigningKey.from_seed(name.encode().ljust(32, b"-")) for name in names}
        self.path = folder / "roster.json"
        rosters.write(
            self.path, Roster(fleet=fleet, devices={n: Entry(key=k.public.hex()) for n, k in self.devices.items()})
        )
        self.roster = RosterFile(self.path)

    def enter(self, name: str, entry: Entry) -> None:
        """Change the roster, as `edge-runtime provision` does while the server runs."""
        RosterFile(self.path).change(lambda roster: roster.having(name, entry))

    @contextmanager
    def guards(self, name: str) -> Iterator[Guard]:
        """What signs for a participant; its ledger is closed in the end."""
        self.now += 1_000_000
        ledger = Ledger(self.folder / f"{name}.ledger", lambda: self.now)
        try:
            yield self.of_server(ledger) if name == "server" else self.of_device(name, ledger)
        finally:
            ledger.close()

    def of_server(self, ledger: Ledger | None = None) -> ServerGuard:
        """The server's guard."""
        return ServerGuard(self.fleet, self.server, RosterFile(self.path), ledger or self._ledger("server"))

    def of_device(self, name: str, ledger: Ledger | None = None, key: SigningKey | None = None) -> DeviceGuard:
        """A device's guard."""
        return DeviceGuard(self.fleet, key or self.devices[name], [self.server.public], ledger or self._ledger(name))

    def _ledger(self, name: str) -> Ledger:
        return Ledger(self.folder / f"{name}.ledger", lambda: self.now)
