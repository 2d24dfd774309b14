"""The fleet that most tests of the protocol disturb, and its undisturbed life."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from tests.runtime.toy import ToyTrainer, targets
from tests.runtime.turns import Fleet, fleet_config

GOAL = targets()
Devices = Mapping[str, Callable[[], ToyTrainer]]

PAIR: Devices = {"a": partial(ToyTrainer, GOAL, rank=2), "b": partial(ToyTrainer, GOAL, rank=4, examples=30)}
"""Two unequal devices."""

BRISK = ("training.max_steps=1", "training.personal_steps=0", "wire.codec_up=fp32")
"""Few reports and several chunks, so that most of what happens is worth a crash."""


@contextmanager
def in_memory() -> Iterator[Path]:
    """A folder in memory where there is one: a fleet commits a hundred times, and no disk is under test here."""
    memory = Path("/dev/shm")  # noqa: S108  the folder below it is made safely
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as place:
        yield Path(place)


def fleet_in(folder: Path, name: str, *overrides: str, devices: Devices = PAIR, **kwargs: Any) -> Fleet:
    return Fleet(folder / name, fleet_config(*overrides), devices, **kwargs)


OWING = (*BRISK[:2], "wire.codec_up=int2", "wire.error_feedback=true", "rounds.num_rounds=3")
"""A codec so coarse that most of an update is owed to the next: whoever loses or doubles that is found out."""


@cache
def calm(settings: tuple[str, ...] = BRISK) -> tuple[str, tuple[tuple[int, int], ...], Mapping[str, int]]:
    """An undisturbed life of PAIR: digest of its last version, its merges, and how many operations each took."""
    with in_memory() as place:
        fleet = fleet_in(place, "calm", *settings).run()
        return fleet.merged().digest(), tuple(fleet.merges()), {who: len(ops) for who, ops in fleet.operations.items()}


def check_undisturbed(fleet: Fleet, settings: tuple[str, ...] = BRISK) -> None:
    """The fleet has merged exactly what an undisturbed one merges: nothing lost, nothing doubled."""
    digest, merges, _ = calm(settings)
    assert fleet.merged().digest() == digest
    assert set(fleet.merges()) == set(merges), "a merge may be recorded twice, but only the same one"
    assert set(fleet.delivered) == set(PAIR)
