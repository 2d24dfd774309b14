"""Fixtures of the room: servers whose turns the test takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.fleets import in_memory
from tests.server.bench import Bench


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def bench(*overrides: str, **kwargs: Any) -> Bench:
        made.append(Bench(tmp_path, *overrides, **kwargs))
        return made[-1]

    yield bench
    for found in made:
        found.store.close()


@pytest.fixture
def bench(make: Callable[..., Bench]) -> Bench:
    return make()


@pytest.fixture
def folder() -> Iterator[Path]:
    with in_memory() as place:
        yield place
