"""The examples of a simulated fleet with real training: read from files, and dealt to devices by class."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_runtime.config import Config
from edge_runtime.errors import DataError
from edge_runtime.train import data, rows
from edge_runtime.train.rows import Example
from simulation import partition
from simulation.settings import Simulation, files_of, name_of

LEAST = 2
"""Examples of a device: one to train on, and one to hold out."""


def load(simulation: Simulation) -> tuple[list[Example], list[str]]:
    """All examples, and the class of each: what its row says, or the name of its file.

    Raises:
        ConfigError: a pattern for which no file is there.
        DataError: a file that cannot be read, or a row that is no example; names file and row.
    """
    examples: list[Example] = []
    classes: list[str] = []
    for path in files_of(simulation):
        found = read(path)
        examples += rows.from_rows(found, name=str(path))
        classes += [str(row.get(simulation.class_field, path.stem)) for row in found]
    return examples, classes


def read(path: Path) -> list[dict[str, object]]:
    """The rows of a JSONL file, as they are.

    Raises:
        DataError: a file that cannot be read, or a line that is no JSON object; names file and line.
    """
    try:
        # Not `splitlines`: within a JSON text there may be characters that end lines elsewhere.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"a file of examples was expected at {path}; found: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: expected one JSON object per line, found: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: expected a JSON object; found {rows.short(row)}")
            found.append(row)
    return found


@dataclass(frozen=True)
class Hands:
    """The examples of a fleet.

    Attributes:
        devices: of each, the numbers of its examples, and how many it trains on.
        shares: of each class, its share of all examples; classes are in the order of their names.
        classes: of each example, the place of its class.
    """

    devices: Sequence[tuple[tuple[int, ...], int]]
    shares: Sequence[float]
    classes: Sequence[int]


def dealt(config: Config, simulation: Simulation, sizes: Sequence[int]) -> Hands:
    """Deal the examples to the devices.

    Args:
        config: the fleet's file: says what is held out, and how many examples a device takes at most.
        simulation: its [simulation].
        sizes: examples of each device; fewer in proportion where there are not as many in all.

    Raises:
        DataError: a device is left without examples; names it.
    """
    examples, classes = load(simulation)
    names = sorted(set(classes))
    members: list[list[int]] = [[] for _ in names]
    order = {name: place for place, name in enumerate(names)}
    places = [order[name] for name in classes]
    for number, place in enumerate(places):
        members[place].append(number)
    whole = np.asarray(sizes, np.int64)
    if whole.sum() > len(examples):
        whole = partition.apportioned((whole / whole.sum())[None, :], np.asarray([len(examples)], np.int64))[0]
    counts = partition.counts(simulation.partition, [max(1, int(size)) for size in whole], len(names), simulation.seed)
    numbers = partition.dealt(counts, members, simulation.seed)
    devices = [f"{name_of(group)}-{index}" for group in simulation.devices for index in range(group.count)]
    found = []
    for device, dealt_to in zip(devices, numbers, strict=True):
        kept = data.sampled([examples[number] for number in dealt_to], config.device.max_examples)
        mine = tuple(dealt_to[index] for index in kept)
        own = [examples[number] for number in mine]
        if len({example.digest() for example in own}) < LEAST:
            raise DataError(
                f"'{device}' has {len(mine)} of the {len(examples)} examples, and at least {LEAST} that differ are "
                "needed; give more data, fewer devices, or another [simulation.partition]"
            )
        found.append((mine, len(data.split(own, fraction=config.device.eval_fraction)[0])))
    return Hands(found, [len(numbers) / len(examples) for numbers in members], places)
