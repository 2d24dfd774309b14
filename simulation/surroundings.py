"""What the devices of a simulation share, who each of them is, and the accounts that are kept of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_runtime.config import Config
from edge_runtime.governor import Thresholds
from edge_runtime.wire.messages import Directive
from simulation.battery import Cell, Charge
from simulation.clock import Clock
from simulation.engines import Engine
from simulation.fleet import Group, Planning
from simulation.host import Host
from simulation.links import Bottleneck
from simulation.log import Log
from simulation.memory import Spent
from simulation.traces import Trace
from simulation.work import Done


@dataclass(eq=False)
class Surroundings:
    """What all devices of a simulation share.

    Attributes:
        config: the fleet's file.
        seed: of the simulation.
        clock: of the simulation.
        host: the server.
        engine: computes what devices compute.
        planning: makes their plans.
        thresholds: of their governors.
        log: where events go.
        trained: told of what a device's round gave.
        total: what all devices have spent.
        keep_alive: seconds after which a device that works says so.
        newest: the retained Directive and its bytes; None before there is one.
        busy: names of the devices that are at work: they hear every Directive.
        classes: the class of each example where data of devices are numbers of examples; None where they are counts of
            classes already.
    """

    config: Config
    seed: int
    clock: Clock
    host: Host
    engine: Engine
    planning: Planning
    thresholds: Thresholds
    log: Log
    trained: Callable[[Directive, Done], None]
    total: Spent
    keep_alive: float
    newest: tuple[Directive, int] | None
    busy: dict[str, None]
    classes: Sequence[int] | None


@dataclass(frozen=True, eq=False)
class Person:
    """Who a device is.

    Attributes:
        name: of the device.
        group: of its kind.
        data: examples of each class, or numbers of its examples.
        examples: that it trains on.
        ways: the bottlenecks of its site, up and down.
        here: when it is there.
        cell: its battery; None on the mains.
        plug: when it is on the plug.
        charge: when the simulation begins.
    """

    name: str
    group: Group
    data: tuple[int, ...]
    examples: int
    ways: tuple[Bottleneck | None, Bottleneck | None]
    here: Trace
    cell: Cell | None = None
    plug: Trace | None = None
    charge: Charge | None = None


class Accounts:
    """What one device spends, written down for itself and for all together.

    Args:
        name: of the device.
        around: what all devices share.
    """

    def __init__(self, name: str, around: Surroundings) -> None:
        self._name, self._around = name, around
        self.spent = Spent()

    def moved(self, size: float, *, up: bool) -> None:
        """So many bytes went over its link."""
        for spent in (self.spent, self._around.total):
            if up:
                spent.bytes_up += size
            else:
                spent.bytes_down += size

    def spend(self, joules: float) -> None:
        """So much energy was used."""
        self.spent.joules += joules
        self._around.total.joules += joules

    def span(self, kind: str, begin: float, end: float, number: int) -> None:
        """It did this from then to then, for a round of that number."""
        if end > begin:
            self.spent.seconds[kind] = self.spent.seconds.get(kind, 0.0) + end - begin
            self._around.log.span(self._name, kind, begin, end, number)
