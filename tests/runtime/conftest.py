"""Fixtures of the room: a desk for one device, and a folder for a whole fleet."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.product import Launcher
from tests.runtime.desk import Desk
from tests.runtime.fleets import in_memory

EXAMPLES = '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n'
FILES = {
    "good.jsonl": EXAMPLES,
    "empty.jsonl": "\n\n",
    "broken.jsonl": EXAMPLES + '{"prompt": "e", ',
    "odd-row.jsonl": EXAMPLES + '\n{"question": "e", "reply": "f"}\n',
    "no-answer.jsonl": '{"prompt": "a", "completion": ""}\n',
    "alike.jsonl": '{"prompt": "a", "completion": "b"}\n' * 3,
    "key.toml": "[rounds]\nnum_round = 3\n",
    "section.toml": "[round]\nnum_rounds = 3\n",
    "value.toml": '[training]\nmax_steps = "many"\n',
    "broken.toml": "[rounds\n",
    "taken": "a file where a folder should be",
}
"""What people give the command, good and bad."""


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


@pytest.fixture
def product(tmp_path: Path) -> Iterator[Launcher]:
    """Starts the product in a folder with good and bad files."""
    folder = tmp_path / "here"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_text(content, encoding="utf-8")
    made = Launcher(folder, {"EDGE_RUNTIME_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hub")})
    yield made
    made.end()
