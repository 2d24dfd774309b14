"""`edge-runtime profile`: what this device is, and the plan it would follow for a base model."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edge_runtime import config as settings
from edge_runtime.cli import shell
from edge_runtime.config import Config
from profiles import device as devices
from profiles import plan as plans
from profiles.card import ModelCard, card_from_config
from profiles.catalogue import device as known_device
from profiles.device import DeviceProfile, Row
from profiles.plan import Plan
from profiles.probe import probe
from server import aggregators

RANKS = (2, 4, 8, 16, 32, 64)


def run(
    base: str | None,
    as_device: str | None,
    memory_limit: str | None,
    file: Path | None,
    overrides: Sequence[str],
    *,
    json: bool,
) -> int:
    """Show the profile, and the plan if a base is named."""
    config = settings.load(file, overrides)
    limit = shell.size(memory_limit) if memory_limit else config.device.memory_limit
    profile = known_device(as_device) if as_device else probe(memory_limit=limit)
    chosen = _plan(profile, config, base) if base else None
    if json:
        found: dict[str, Any] = {"profile": profile.to_json(), "plan": chosen.to_json() if chosen else None}
        print(jsonlib.dumps(found))  # noqa: T201  what --json is for
        return 0
    console = Console(highlight=False)
    console.print(_table(f"{profile.name}: what this device is", devices.rows(profile)))
    if chosen:
        console.print(_table(f"the plan for {base}", plans.rows(chosen)))
    return 0


def _plan(profile: DeviceProfile, config: Config, base: str) -> Plan:
    adapter = config.adapter
    method = aggregators.build(config.aggregator.method, **(config.aggregator.model_extra or {}))
    return plans.plan(
        profile,
        _card(base),
        target_modules=adapter.target_modules,
        rank_choices=tuple(rank for rank in RANKS if rank <= adapter.max_rank) or (adapter.max_rank,),
        held_limit=config.aggregator.rank or method.server_rank(adapter.max_rank),
        max_length=adapter.max_length,
        batch_size=config.training.batch_size,
        threads=config.device.threads,
    )


def _card(base: str) -> ModelCard:
    """A folder's own config.json, without torch; any other base is prepared first."""
    if (Path(base) / "config.json").exists():
        return card_from_config(Path(base), name=base)
    from edge_runtime.train.base import prepare

    say = shell.logger("profile", as_json=False)
    return card_from_config(prepare(base, precision="nf4", cache=settings.cache_dir(), say=say).folder, name=base)


def _table(title: str, rows: Iterable[Row]) -> Table:
    table = Table(title=title, title_style="bold", header_style="bold", show_lines=False)
    table.add_column("what", style="bold", no_wrap=True)
    table.add_column("value")
    table.add_column("because", style="dim")
    for row in rows:
        table.add_row(*(str(cell) for cell in (row.field, row.value, row.reason)))
    return table
