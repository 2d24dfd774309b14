"""`edge-runtime profile`: what this device is, and the plan it would follow for a base model."""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edge_runtime import config as settings
from edge_runtime.cli import shell
from edge_runtime.config import Config
from edge_runtime.train import planning
from edge_runtime.trainer import Training
from profiles import device as devices
from profiles import memory, speed
from profiles import plan as plans
from profiles.card import ModelCard
from profiles.catalogue import device as known_device
from profiles.device import MIB, DeviceProfile, Row
from profiles.find_card import find_card
from profiles.measure import SMOLLM2_SHAPES
from profiles.plan import Plan
from profiles.remembered import remembered_probe
from server import aggregators, exchange
from server.fitting import spec_of


@dataclass(frozen=True)
class Asked:
    """What the person wants to see.

    Attributes:
        base: also the plan for this base model.
        as_device: as a device of the catalogue, or of a file, would plan; this machine otherwise.
        memory_limit: bytes that training may use, as a person writes them.
        refresh: measure anew, whatever is remembered.
        explain: also the memory and the time part by part, and what a better plan would need.
        link: test the link to the broker as well.
        json: for machines.
    """

    base: str | None
    as_device: str | None
    memory_limit: str | None
    refresh: bool
    explain: bool
    link: bool
    json: bool


def run(asked: Asked, flags: Mapping[str, Any], broker: str | None, file: Path | None, overrides: Sequence[str]) -> int:
    """Show the profile, and the plan if a base is named."""
    config = shell.with_device(shell.with_broker(settings.load(file, overrides), broker), flags, asked.memory_limit)
    card = find_card(asked.base) if asked.base else None
    profile = known_device(asked.as_device) if asked.as_device else _probed(asked, config, card)
    if asked.link:
        profile = _with_link(profile, config)
    chosen = _plan(profile, config, card) if card else None
    if asked.json:
        print(jsonlib.dumps(_as_json(profile, config, card, chosen)))  # noqa: T201  what --json is for
        return 0
    console = Console(highlight=False)
    console.print(_table(f"{profile.name}: what this device is", devices.rows(profile)))
    if card and chosen:
        console.print(_table(f"the plan for {asked.base}", plans.rows(chosen)))
        if asked.explain:
            _explain(console, profile, config, card, chosen)
    return 0


def _probed(asked: Asked, config: Config, card: ModelCard | None) -> DeviceProfile:
    return remembered_probe(
        settings.cache_dir() / "profiles",
        memory_limit=config.device.memory_limit,
        refresh=asked.refresh,
        say=shell.logger("profile", as_json=asked.json),
        shapes=speed.shapes(card) if card else SMOLLM2_SHAPES,
    )


def _with_link(profile: DeviceProfile, config: Config) -> DeviceProfile:
    from edge_runtime.wire import linktest

    say, stop = shell.logger("profile", as_json=False), shell.stop_on_signals()
    name = shell.device_name(config)
    transport = shell.connect(config, f"edge-{config.fleet.name}-{name}-link", say, stop)
    try:
        rates = linktest.measure(transport, config.fleet.name, name, clock=time.monotonic)
    finally:
        transport.close()
    return devices.with_link(
        profile,
        up_mbit_s=rates.up_mbit_s,
        down_mbit_s=rates.down_mbit_s,
        latency_ms=rates.latency_ms,
        reason=rates.reason,
    )


def _plan(profile: DeviceProfile, config: Config, card: ModelCard) -> Plan:
    """The plan that `edge-runtime client` would follow in a fleet of this configuration."""
    training = config.training
    method = aggregators.build(config.aggregator.method, **(config.aggregator.model_extra or {}))
    spec = spec_of(config, method, exchange.rank_of(config, method))
    asked = Training(**training.model_dump(exclude={"personal_steps"}))
    return planning.choose(profile, card, spec, asked, planning.owner_of(config.device), None)


def _setting(chosen: Plan, config: Config) -> memory.Setting:
    return replace(chosen.setting(config.adapter.target_modules), regained=config.adapter.regained)


def _as_json(profile: DeviceProfile, config: Config, card: ModelCard | None, chosen: Plan | None) -> dict[str, Any]:
    found: dict[str, Any] = {"profile": profile.to_json(), "plan": None}
    if card and chosen:
        setting = _setting(chosen, config)
        found.update(
            plan=chosen.to_json(),
            card={**asdict(card), "parameters": card.parameters},
            memory=memory.estimate(card, setting, profile.pool).parts,
            seconds=_seconds(profile, card, setting, chosen) if speed.measured(profile, setting) else None,
        )
    return found


def _explain(console: Console, profile: DeviceProfile, config: Config, card: ModelCard, chosen: Plan) -> None:
    """Where memory and time go, and what better would cost."""
    setting = _setting(chosen, config)
    estimate = memory.estimate(card, setting, profile.pool)
    console.print(_table(
        f"{card.name}: {card.parameters / 1e6:,.1f} million parameters ({card.origin}); "
        f"predicted peak {estimate.total / MIB:,.0f} MiB",
        [Row(name.replace("_", " "), devices.shown(size, "bytes"), memory.PARTS[name])
         for name, size in estimate.parts.items()],
    ))  # fmt: skip
    if speed.measured(profile, setting):
        seconds = _seconds(profile, card, setting, chosen)
        console.print(_table(
            f"predicted {sum(seconds.values()):.2f} s a step of {chosen.gradient_accumulation_steps} passes of "
            f"{setting.micro_batch} x {setting.max_length} tokens",
            [Row(name, f"{value:.3f} s", speed.PARTS[name]) for name, value in seconds.items()],
        ))  # fmt: skip
    better = [Row(name.replace("_", " "), "", said) for name, said in chosen.next_better.items()]
    if better:
        console.print(_table("what the next better choice would need", better))


def _seconds(profile: DeviceProfile, card: ModelCard, setting: memory.Setting, chosen: Plan) -> dict[str, float]:
    """Part → predicted seconds of one optimiser step."""
    return speed.parts(profile, card, setting, chosen.gradient_accumulation_steps)


def _table(title: str, rows: Iterable[Row]) -> Table:
    lines = [tuple(str(cell) for cell in (row.field, row.value, row.reason)) for row in rows]
    table = Table(title=title, title_style="bold", header_style="bold", show_lines=False)
    table.add_column("what", style="bold", no_wrap=True)
    if any(value for _, value, _ in lines):
        table.add_column("value")
    table.add_column("because", style="dim")
    for line in lines:
        table.add_row(*(cell for index, cell in enumerate(line) if index != 1 or len(table.columns) == 3))
    return table
