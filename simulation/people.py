"""Who the devices of a simulation are: their names, data, links, traces and batteries, and their rows at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edge_runtime.config import Config
from edge_runtime.errors import ConfigError
from edge_runtime.trainer import Training
from simulation import partition, traces
from simulation.battery import Cell, Charge
from simulation.device import Device
from simulation.fleet import Group
from simulation.links import MEGA, Bottleneck
from simulation.settings import Availability, Battery, Simulation
from simulation.surroundings import Person
from simulation.tables import DeviceRow
from simulation.traces import Span

KINDS = ("computing", "paused", "sending", "receiving", "away")


def with_room(config: Config, simulation: Simulation) -> Config:
    """The fleet's file for a server that bears as many devices as there are."""
    count = sum(group.count for group in simulation.devices)
    server = config.server.model_copy(update={"max_members": max(count, config.server.max_members)})
    return config.model_copy(update={"server": server})


def check(config: Config, simulation: Simulation) -> None:
    """Refuse a fleet that would never begin.

    Raises:
        ConfigError: it waits for more devices than there are.
    """
    count, least = sum(group.count for group in simulation.devices), config.rounds.min_available_nodes
    if count < least:
        raise ConfigError(
            f"[rounds] min_available_nodes waits for {least} devices, and [simulation] has {count}; lower it, or raise "
            "the count of a group"
        )


def training_of(config: Config) -> Training:
    """What a round asks for, as a plan sees it."""
    return Training(**config.training.model_dump(exclude={"personal_steps"}))


def sizes_of(simulation: Simulation) -> list[int]:
    """Examples of each device, in the order of the file, as far as its share says."""
    sizes = ((max(1, round(simulation.examples * group.data_share)), group.count) for group in simulation.devices)
    return [size for size, count in sizes for _ in range(count)]


class People:
    """The devices of a fleet.

    Args:
        config: the fleet's file.
        simulation: its [simulation].
        groups: one for each table of devices, in that order.

    Raises:
        DataError: examples or traces that cannot be used.
    """

    def __init__(self, config: Config, simulation: Simulation, groups: Sequence[Group]) -> None:
        self._seed = simulation.seed
        self._sites = {name: (_way(site.up_mbit_s), _way(site.down_mbit_s)) for name, site in simulation.sites.items()}
        self._files: dict[Path, Mapping[str, Sequence[Span]]] = {}
        members = [(group, number) for group in groups for number in range(group.settings.count)]
        data, self.shares, self.classes = _data(config, simulation, sizes_of(simulation))
        self.people = [
            self._person(group, number, *found) for (group, number), found in zip(members, data, strict=True)
        ]
        """In the order of the file."""

    def _person(self, group: Group, number: int, data: tuple[int, ...], examples: int) -> Person:
        name, settings = f"{group.name}-{number}", group.settings
        here = self._trace(settings.availability, name)
        ways = self._sites[settings.site] if settings.site else (None, None)
        battery = settings.battery
        if battery is None:
            return Person(name, group, data, examples, ways, here)
        cell = Cell(battery.capacity_wh, battery.charge_watts, group.load_watts, group.idle_watts)
        plug = self._trace(battery.plugged, f"{name}/plug")
        return Person(name, group, data, examples, ways, here, cell, plug, _charge(battery))

    def _trace(self, settings: Availability, name: str) -> traces.Trace:
        if settings.file is not None and settings.file not in self._files:
            self._files[settings.file] = traces.read(settings.file)
        recorded = self._files.get(settings.file, {}) if settings.file else {}
        return traces.trace(settings, self._seed, name, recorded)


def _way(mbit_s: float | None) -> Bottleneck | None:
    return None if mbit_s is None else Bottleneck(MEGA * mbit_s)


def _charge(battery: Battery) -> Charge:
    return Charge(battery.level)


def _data(
    config: Config, simulation: Simulation, sizes: Sequence[int]
) -> tuple[Sequence[tuple[tuple[int, ...], int]], Sequence[float], Sequence[int] | None]:
    """Of each device, its data and how many examples it trains on; the fleet's shares of the classes; and `classes`."""
    if simulation.trainer == "real":
        from simulation import examples  # noqa: PLC0415  it reads files as the real trainer does

        hands = examples.dealt(config, simulation, sizes)
        return hands.devices, hands.shares, hands.classes
    counts = partition.counts(simulation.partition, sizes, simulation.classes, simulation.seed)
    total = counts.sum(axis=0)
    rows = [tuple(map(int, row)) for row in counts]
    return [(row, sum(row)) for row in rows], [float(share) for share in total / total.sum()], None


def row_of(device: Device, now: float) -> DeviceRow:
    """A device's row at the end."""
    spent, planned = device.accounts.spent, device.planned
    seconds = {kind: spent.seconds.get(kind, 0.0) for kind in KINDS}
    plan = planned.plan if planned else None
    return DeviceRow(
        device=device.name,
        group=device.person.group.name,
        plan=planned.intro.plan if planned else "",
        rank=plan.rank if plan else 0,
        held=plan.held if plan else 0,
        examples=device.person.examples,
        rounds=spent.rounds,
        **seconds,
        waiting=max(0.0, now - sum(seconds.values())),
        crashes=spent.crashes,
        bytes_up=spent.bytes_up,
        bytes_down=spent.bytes_down,
        joules=spent.joules,
        held_out=spent.held_out,
        personal=spent.personal,
        accuracy=spent.accuracy,
        personal_accuracy=spent.personal_accuracy,
    )
