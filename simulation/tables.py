"""A run as tables: a row for each version, and one for each device. CSV, and Parquet where pyarrow is installed."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class VersionRow:
    """The global adapter after a round.

    Attributes:
        round: its number.
        version: of the global adapter.
        seconds: of virtual time since the simulation began.
        loss: of the global adapter on all data of the fleet; None where only devices know it.
        floor: the least that it can be; None likewise.
        held_out: mean over the devices that trained from the version before, of its loss on what they hold out.
        updates: merged.
        truncation: relative error of the merge.
        bytes_up: by all devices since the beginning.
        bytes_down: likewise; Directives are not counted.
        joules: likewise.
        accuracy: mean over the same devices, of the share of held-out tokens that the version before holds most likely;
            None where no tokens are said.
    """

    round: int
    version: int
    seconds: float
    loss: float | None
    floor: float | None
    held_out: float | None
    updates: int
    truncation: float
    bytes_up: float
    bytes_down: float
    joules: float
    accuracy: float | None = None


@dataclass(frozen=True)
class DeviceRow:
    """A device, at the end.

    Attributes:
        device: its name.
        group: of the fleet's file.
        plan: in words; empty for one that never planned.
        rank: directions that it trains.
        held: directions that it holds.
        examples: its own.
        rounds: whose updates were accepted.
        computing: seconds.
        paused: seconds in which its governor, or an empty battery, had it wait.
        sending: seconds.
        receiving: seconds.
        away: seconds.
        waiting: seconds in which it was there and had nothing to do.
        crashes: of it.
        bytes_up: sent.
        bytes_down: received.
        joules: of its work for the fleet.
        held_out: of the last version that it trained from.
        personal: loss of its personal adapter.
        accuracy: as of `held_out`.
        personal_accuracy: of its personal adapter.
    """

    device: str
    group: str
    plan: str
    rank: int
    held: int
    examples: int
    rounds: int
    computing: float
    paused: float
    sending: float
    receiving: float
    away: float
    waiting: float
    crashes: int
    bytes_up: float
    bytes_down: float
    joules: float
    held_out: float | None
    personal: float | None
    accuracy: float | None = None
    personal_accuracy: float | None = None


Rows = Sequence[VersionRow] | Sequence[DeviceRow]


def write(folder: Path, name: str, rows: Rows) -> list[Path]:
    """Write a table; the files that it is in.

    Args:
        folder: that there is.
        name: of the files, without their endings.
        rows: at least one, all of a kind.
    """
    columns = [entry.name for entry in fields(rows[0])]
    path = folder / f"{name}.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(astuple(row) for row in rows)
    return [path, *_parquet(folder / f"{name}.parquet", rows)]


def _parquet(path: Path, rows: Rows) -> list[Path]:
    if find_spec("pyarrow") is None:
        return []
    from pyarrow import Table, parquet  # noqa: PLC0415  whoever has it gets it; no extra asks for it

    parquet.write_table(Table.from_pylist([asdict(row) for row in rows]), path)
    return [path]
