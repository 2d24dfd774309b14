"""`edge-runtime prepare`: convert a base model once, so that small devices never see it whole."""

from __future__ import annotations

from edge_runtime import config as settings
from edge_runtime.cli import shell
from edge_runtime.train import base as bases


def run(base: str, precision: str, regained: int) -> int:
    """Convert, or find converted, and say where it is."""
    say = shell.logger("prepare", as_json=False)
    prepared = bases.prepare(base, precision=precision, regained=regained, cache=settings.cache_dir(), say=say)
    say(f"{prepared.label} at {precision} in {prepared.folder}; fingerprint {prepared.fingerprint[:16]}")
    return 0
