"""A device of the tests: examples of its own in a folder of its own, and a plan that no machine changes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from edge_runtime.train import data
from edge_runtime.train.local import LocalSettings
from edge_runtime.train.planning import Owner
from profiles.terms import Overrides
from tests.story.fleet import write_examples


@cache
def _measured() -> TemporaryDirectory[str]:
    """Where all devices of one test process remember what was measured of the machine in two seconds."""
    return TemporaryDirectory()


def cache_in(folder: Path) -> Path:
    """A cache that knows what this machine can do, and nothing else."""
    found = folder / "cache"
    if not found.exists():
        found.mkdir()
        (found / "profiles").symlink_to(_measured().name, target_is_directory=True)
    return found


def settings_in(folder: Path, base: Path, plan: Overrides) -> LocalSettings:
    """A device that keeps nothing on disk but its examples and its tokens."""
    return LocalSettings(
        base=str(base),
        examples=data.load_examples(str(write_examples(folder / "examples.jsonl", 0))),
        eval_fraction=0.25,
        eval_examples=2,
        owner=Owner(overrides=plan),
        cache=cache_in(folder),
    )
