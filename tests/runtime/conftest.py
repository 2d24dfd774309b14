"""Fixtures of the room: a desk for one device, and a folder for a whole fleet."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.desk import Desk
from tests.runtime.fleets import in_memory


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    found = Desk(tmp_path / "device")
    yield found
    found.disk.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    with in_memory() as place:
        yield place


@pytest.fixture
def closed_port() -> int:
    """A port at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
