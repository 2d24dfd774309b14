"""Runs and sweeps of a fleet's file: each combination in a folder of its own, their outcomes in one table."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from edge_runtime.config import Config
from server import aggregators
from simulation import settings, tables
from simulation.settings import Simulation
from simulation.tables import DeviceRow
from simulation.world import Outcome, Say, World

__all__ = ["DeviceRow", "Ran", "Run", "compared", "done", "planned"]

Progress = Callable[[int, int], None]

LONGEST = 150
"""Characters of a folder's name; a swept `simulation.devices` has more, and no file system bears over 255."""


@dataclass(frozen=True)
class Run:
    """One run that is to be done.

    Attributes:
        folder: where its files go.
        chosen: what it tries, as `section.key=value`.
        config: the fleet's file with that.
        simulation: likewise.
    """

    folder: Path
    chosen: tuple[str, ...]
    config: Config
    simulation: Simulation


@dataclass(frozen=True)
class Ran:
    """A run that is done.

    Attributes:
        run: which.
        outcome: what it came to.
        files: what it wrote.
    """

    run: Run
    outcome: Outcome
    files: Sequence[Path]

    @property
    def figures(self) -> dict[str, Any]:
        """What is told of it in one line."""
        last = self.outcome.versions[-1] if self.outcome.versions else None
        return {
            "finished": self.outcome.finished,
            "rounds": len(self.outcome.versions),
            "seconds": self.outcome.seconds,
            "loss": last.loss if last else None,
            "floor": last.floor if last else None,
            "held_out": last.held_out if last else None,
            "accuracy": last.accuracy if last else None,
            "bytes_up": last.bytes_up if last else 0.0,
            "bytes_down": last.bytes_down if last else 0.0,
            "joules": last.joules if last else 0.0,
            "adapter": self.outcome.adapter,
            "why": self.outcome.why,
        }


def planned(path: Path, overrides: Sequence[str], sweep: Sequence[str], out: Path) -> list[Run]:
    """The runs of a file: one, or one for each combination of what is swept.

    Raises:
        ConfigError: of the file, or of any combination, before the first one begins.
    """
    runs = []
    for chosen in settings.sweeps(sweep):
        config, simulation = settings.load(path, [*overrides, *chosen])
        aggregators.build(config.aggregator.method, **(config.aggregator.model_extra or {}))
        folder = out / _folder(chosen) if chosen else out
        runs.append(Run(folder, chosen, config, simulation))
    return runs


def _folder(chosen: Sequence[str]) -> str:
    """What to call a run's folder: what it tries, as far as a file system bears the length."""
    text = ",".join(chosen)
    name = re.sub(r"[^A-Za-z0-9=._-]+", "-", text).strip("-")
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{sha256(text.encode()).hexdigest()[:12]}"


def done(
    runs: Sequence[Run], *, say: Say, stop: Callable[[], bool], progress: Callable[[Run], Progress]
) -> Iterator[Ran]:
    """Do one run after the other; each is given as soon as it is done.

    Args:
        runs: as `planned` gave them.
        say: told sentences for people.
        stop: asked now and then.
        progress: given a run, makes what is told of its rounds.

    Raises:
        KeyboardInterrupt: `stop` said so; the same runs go on from there.
        EdgeRuntimeError: a run cannot be done.
    """
    for run in runs:
        world = World(run.config, run.simulation, run.folder, say=say)
        outcome = world.run(stop=stop, progress=progress(run))
        files = []
        if outcome.versions:
            files += tables.write(run.folder, "rounds", outcome.versions)
        files += tables.write(run.folder, "devices", outcome.devices)
        yield Ran(run, outcome, files)


def compared(ran: Sequence[Ran], path: Path) -> None:
    """Write what a sweep found: a row for each run."""
    keys = [text.partition("=")[0] for text in ran[0].run.chosen]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*keys, "folder", *ran[0].figures])
        for each in ran:
            tried = [text.partition("=")[2] for text in each.run.chosen]
            writer.writerow([*tried, each.run.folder.name, *each.figures.values()])
