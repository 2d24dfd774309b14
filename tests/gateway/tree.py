"""A tree of fleets over brokers in memory: a root, gateways, and devices behind them, each awake in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path

from edge_runtime.client import Identity, will
from edge_runtime.gateway.gateway import Gateway
from edge_runtime.gateway.subtree import Subtree
from edge_runtime.state import DeviceState
from edge_runtime.wire.guard import OPEN, Guard
from edge_runtime.wire.messages import Directive
from server.store import Store
from tests.runtime.fleets import Devices
from tests.runtime.turns import Clock, Fleet, Fuse, Seat, fleet_config, guarded

Sites = Mapping[str, Devices]
Guards = Callable[[str], AbstractContextManager[Guard]]


def no_guards(_name: str) -> AbstractContextManager[Guard]:
    """Nobody signs."""
    return nullcontext(OPEN)


class Tree:
    """A root fleet whose devices are gateways, and the fleets behind them.

    Args:
        folder: for all disks.
        settings: the root's overrides.
        sites: gateway → its devices. The fleet behind it has its name.
        below: overrides of every subtree.
        direct: devices of the root that are behind no gateway.
        fuses: gateway → numbers of its fatal operations, one for each of its lives.
        secrets: fleet → participant → what signs for it there; nothing does without.
        above: gateway → the site whose device it is, where it is none of the root.
    """

    def __init__(
        self,
        folder: Path,
        settings: tuple[str, ...],
        sites: Sites,
        *,
        below: tuple[str, ...] = (),
        direct: Devices | None = None,
        fuses: Mapping[str, list[int]] | None = None,
        secrets: Callable[[str], Guards] = lambda _: no_guards,
        above: Mapping[str, str] | None = None,
    ) -> None:
        self._secrets, self._above = secrets, above or {}
        self.folder, self._settings, self._below = folder, settings, below
        self._fuses = {name: list(numbers) for name, numbers in (fuses or {}).items()}
        self.root = Fleet(folder / "root", fleet_config(*settings), direct or {}, guards=secrets("fleet"))
        self.sites = {name: self._site(name, devices) for name, devices in sites.items()}
        self.clock = Clock()
        self.seats: dict[str, Seat] = {}
        self.operations: dict[str, list[str]] = {}
        self.kills: list[str] = []
        for name in sites:
            self.join(name)

    def _site(self, name: str, devices: Devices) -> Fleet:
        count = len(devices) + sum(site == name for site in self._above.values())
        settings = fleet_config(*self._settings, f"rounds.min_available_nodes={count}", *self._below)
        settings = settings.model_copy(update={"fleet": settings.fleet.model_copy(update={"name": name})})
        return Fleet(self.folder / name, settings, devices, absent=("server",), guards=self._secrets(name))

    def join(self, name: str) -> None:
        """Start a gateway, for the first time or again."""
        numbers = self._fuses.get(name, [])
        fuse = Fuse(numbers.pop(0) if numbers else None)
        self.operations[name] = fuse.seen
        self.seats[name] = Seat(name, partial(self._be_gateway, name), fuse)

    def leave(self, name: str) -> None:
        """Stop a gateway in order."""
        self.seats.pop(name).dismiss()

    def sweep(self) -> None:
        """One turn for everybody; a killed gateway starts again."""
        self.clock.now += 1.0
        self.root.sweep()
        for site in self.sites.values():
            site.sweep()
        for name, seat in list(self.seats.items()):
            if seat.ended:
                continue
            seat.turn()
            if seat.error is not None and type(seat.error).__name__ == "Killed":
                self.kills.append(f"{name}: {seat.error}")
                self.join(name)
            elif seat.error is not None:
                raise seat.error

    def run(self, *, until: Callable[[], bool] | None = None, sweeps: int = 3000) -> Tree:
        """Let everybody work until all have ended, or `until()` says so."""
        for _ in range(sweeps):
            if until() if until else self.ended:
                return self
            self.sweep()
        notes = {name: site.notes[-4:] for name, site in {"root": self.root, **self.sites}.items()}
        raise TimeoutError(f"the tree did not finish in {sweeps} sweeps: {notes}")

    @property
    def ended(self) -> bool:
        """Whether all participants have ended."""
        fleets = self.root.ended and all(site.ended for site in self.sites.values())
        return fleets and all(seat.ended for seat in self.seats.values())

    def close(self) -> None:
        """Stop whoever is still there."""
        for name in list(self.seats):
            if not self.seats[name].ended:
                self.leave(name)
        for fleet in (self.root, *self.sites.values()):
            fleet.close()

    def _be_gateway(self, name: str, seat: Seat) -> None:
        site, root = self.sites[name], self.sites[self._above[name]] if name in self._above else self.root
        guards = ExitStack()
        guard = guards.enter_context(self._secrets(root.config.fleet.name)(name))
        server = guards.enter_context(self._secrets(name)("server"))
        above = root.broker.connect(name, will=will(root.config.fleet.name, name, guard))
        below = site.broker.connect("server")
        disk = DeviceState(self.folder / f"gateway-{name}")
        opened: list[Store] = []

        def subtree(run: str, directive: Directive) -> Subtree:
            store = Store(self.folder / f"gateway-{name}" / run)
            opened.append(store)
            return Subtree(
                site.config, directive, guarded(below, seat.fuse), guarded(store, seat.fuse),
                say=site.notes.append, record=site.records.append, clock=self.clock, guard=server,
            )  # fmt: skip

        try:
            Gateway(
                Identity(root.config.fleet.name, name, chunk_bytes=400, guard=guard),
                site.config,
                transport=guarded(above, seat.fuse),
                state=guarded(disk, seat.fuse),
                subtree=subtree,
                say=lambda text: site.notes.append(f"{name}: {text}"),
                record=site.records.append,
                clock=self.clock,
            ).run(seat.stop, poll=0.0)
        except BaseException:
            above.drop()
            raise
        finally:
            above.close()
            below.close()
            disk.close()
            for store in opened:
                store.close()
            guards.close()
