"""A simulated fleet handed out to real devices: the examples of each as a file, and the configuration to join with.

What a device is dealt here is what its simulated twin trains on, under the same name and with the same choices of its
owner. So `edge-runtime server` and a client for each of these folders run for real what `edge-runtime simulate` runs in
virtual time, from one file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.config import Config, dump
from edge_runtime.errors import ConfigError
from edge_runtime.open_section import OpenSection
from simulation import examples, people
from simulation.fleet import device_of
from simulation.settings import Devices, Simulation, files_of, name_of

EXAMPLES, CONFIGURATION, STATE = "examples.jsonl", "device.toml", "state"


@dataclass(frozen=True)
class Dealt:
    """What one device was given.

    Attributes:
        name: its client id.
        examples: rows of its file.
        configuration: for `edge-runtime client --config`.
    """

    name: str
    examples: int
    configuration: Path


def deal(config: Config, simulation: Simulation, folder: Path) -> list[Dealt]:
    """Write a folder for each device, over what was dealt there before; a device's state is left alone.

    Args:
        config: the fleet's file.
        simulation: its [simulation].
        folder: for the folders, each called as its device.

    Raises:
        ConfigError: a simulation of what no real device does; says what to change.
        DataError: examples that cannot be read, or a device without any.
    """
    _check(simulation)
    data = examples.dealt(config, simulation, people.sizes_of(simulation)).devices
    rows = [row for path in files_of(simulation) for row in examples.read(path)]
    members = [(group, number) for group in simulation.devices for number in range(group.count)]
    return [
        _handed_out(
            config, simulation, group, (folder / f"{name_of(group)}-{number}").absolute(), [rows[at] for at in mine]
        )
        for (group, number), (mine, _) in zip(members, data, strict=True)
    ]


def _check(simulation: Simulation) -> None:
    refused = "nothing can be dealt to real devices: [simulation]"
    if simulation.trainer == "surrogate":
        raise ConfigError(f"{refused} trainer = 'surrogate' has no examples; expected trainer = 'real' with data")
    if simulation.precision is not None:
        raise ConfigError(
            f"{refused} precision loads one base for all devices, whatever their plans say; expected [device] "
            "precision, or that of a group's owner"
        )


def _handed_out(
    config: Config, simulation: Simulation, group: Devices, folder: Path, rows: Sequence[dict[str, object]]
) -> Dealt:
    """One device's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EXAMPLES).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = Path(simulation.base).expanduser()
    device = device_of(config.device, group).model_copy(
        update={
            "name": folder.name,
            "base": str(base.absolute()) if base.exists() else simulation.base,
            "data": str(folder / EXAMPLES),
            "state_dir": folder / STATE,
        }
    )
    own = config.model_copy(update={"device": device, "simulation": OpenSection()})
    (folder / CONFIGURATION).write_text(dump(own, defaults=False), encoding="utf-8")
    return Dealt(folder.name, len(rows), folder / CONFIGURATION)
