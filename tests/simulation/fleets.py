"""Small fleets in virtual time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simulation import settings
from simulation.world import Outcome, World

SMALL = (
    "rounds.num_rounds=2", "training.max_steps=4", "training.personal_steps=2", "adapter.max_rank=4",
    "simulation.surrogate={layers = 2, width = 8, rank = 2}", "simulation.classes=3", "simulation.examples=12",
)  # fmt: skip
THREE = '[{device = "raspberry-pi-5", count = 2, name = "pi"}, {device = "jetson-orin-nano", name = "orin"}]'


def asked(*overrides: str, devices: str = THREE, least: int = 3) -> list[str]:
    """Overrides that make a fleet's file."""
    return [*SMALL, f"rounds.min_available_nodes={least}", f"simulation.devices={devices}", *overrides]


def world(folder: Path, *overrides: str, kills: Mapping[int, str] | None = None, **fleet: Any) -> World:
    """A simulation that has not begun."""
    config, simulation = settings.load(None, asked(*overrides, **fleet))
    return World(config, simulation, folder, say=lambda _: None, kills=kills)


def run(folder: Path, *overrides: str, kills: Mapping[int, str] | None = None, **fleet: Any) -> Outcome:
    """One that is over."""
    return world(folder, *overrides, kills=kills, **fleet).run()


def events(folder: Path) -> bytes:
    """The event log of a run."""
    return (folder / "events.jsonl").read_bytes()
