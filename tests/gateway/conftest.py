"""What tests of gateways share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.fleets import in_memory


@pytest.fixture
def folder() -> Iterator[Path]:
    with in_memory() as place:
        yield place
