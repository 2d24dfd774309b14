"""`edge-runtime simulate`: a fleet that is not there, in virtual time."""

from __future__ import annotations

import json as texts
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from edge_runtime.cli import shell
from edge_runtime.errors import INTERRUPTED, RoundError, missing_extra
from simulation import dealing, running, settings
from simulation.report import writing
from simulation.report.protocols import Questions
from simulation.running import Ran, Run


def run(
    file: Path,
    sweep: Sequence[str],
    out: Path,
    overrides: Sequence[str],
    *,
    json: bool,
    drawn: bool = False,
    asked: Questions = writing.ANYTHING,
) -> int:
    """Simulate; 0 when all rounds of all runs are merged, 14 when some are not, 130 when interrupted (it goes on).

    Args:
        file: of the fleet.
        sweep: `section.key=a,b,c`, each.
        out: folder of what is written.
        overrides: `section.key=value`, each.
        json: print JSON instead of tables.
        drawn: whether the report is written at the end.
        asked: targets and budgets that the report judges by; it chooses some when there are none.
    """
    runs = running.planned(file, overrides, sweep, out)
    console = Console(stderr=True)
    say = shell.logger("simulate", as_json=json)
    stop = shell.stop_on_signals()
    ran: list[Ran] = []
    with nullcontext() if json else _bar(console) as bar:
        try:
            for each in running.done(runs, say=say, stop=stop, progress=lambda run: _told(bar, run)):
                ran.append(each)
                if json:
                    sys.stdout.write(texts.dumps(_as_json(each)) + "\n")
        except KeyboardInterrupt:
            say("interrupted; what devices computed is kept, and the same command goes on from there")
            return INTERRUPTED
    if sweep:
        running.compared(ran, out / writing.SWEPT)
    if not json:
        _show(Console(), ran)
        console.print(
            f"in {out}/: {', '.join(sorted({path.name for each in ran for path in each.files}))}, events.jsonl"
        )
    if drawn:
        _reported(ran, out, asked, say)
    return 0 if all(each.outcome.finished for each in ran) else RoundError.exit_code


def deal(file: Path, folder: Path, overrides: Sequence[str], *, json: bool) -> int:
    """Hand a simulated fleet out to real devices; simulate nothing.

    Args:
        file: of the fleet.
        folder: for the folders of the devices.
        overrides: `section.key=value`, each.
        json: print JSON, one object for each device.

    Raises:
        ConfigError: of the file, or a simulation of what no real device does.
        DataError: examples that cannot be read, or a device without any.
    """
    config, simulation = settings.load(file, overrides)
    dealt = dealing.deal(config, simulation, folder)
    if json:
        for each in dealt:
            facts = {"device": each.name, "examples": each.examples, "configuration": str(each.configuration)}
            sys.stdout.write(texts.dumps(facts) + "\n")
        return 0
    table = Table("device", "examples", "joins with")
    for each in dealt:
        table.add_row(each.name, str(each.examples), f"edge-runtime client --config {each.configuration}")
    console = Console()
    console.print(table)
    console.print(f"once edge-runtime server --config {file} runs, and a broker at its [broker]")
    return 0


def report(folder: Path, asked: Questions, *, json: bool) -> int:
    """Report runs that have ended.

    Raises:
        DataError: there are none in that folder.
        MissingExtraError: matplotlib is not installed; the tables are written.
    """
    say = shell.logger("simulate", as_json=json)
    written = writing.of_folder(folder, asked)
    say(f"in {folder}/: {', '.join(path.name for path in written.files)}")
    if not written.drawn:
        raise missing_extra("matplotlib", "simulate")
    return 0


def _reported(ran: Sequence[Ran], out: Path, asked: Questions, say: Callable[[str], None]) -> None:
    if ran[0].run.chosen:
        tried = [(_parted(each.run.chosen), each.run.folder) for each in ran]
        written = writing.of_sweep(out, tried, asked)
    else:
        written = writing.of_run(out, asked)[0]
    # A run that has ended well is not spoilt by a picture that cannot be drawn.
    say(f"report: {out / writing.HTML}" if written.drawn else f"no report: {missing_extra('matplotlib', 'simulate')}")


def _parted(chosen: Sequence[str]) -> dict[str, str]:
    return {key: value for key, _, value in (text.partition("=") for text in chosen)}


def _as_json(ran: Ran) -> dict[str, object]:
    rows = {"versions": [asdict(row) for row in ran.outcome.versions]}
    return {"run": list(ran.run.chosen), "folder": str(ran.run.folder), **ran.figures, **rows}


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _told(bar: Progress | None, run: Run) -> Callable[[int, int], None]:
    if bar is None:
        return lambda _done, _of: None
    task = bar.add_task(", ".join(run.chosen) or "rounds", total=None)
    return lambda done, of: bar.update(task, completed=done, total=of)


def _show(console: Console, ran: Sequence[Ran]) -> None:
    """The runs, and of a single one its devices by group."""
    known = any(each.figures["accuracy"] is not None for each in ran)
    table = Table("run", "rounds", "virtual time", "loss", "held out", *(["accuracy"] if known else []),
                  "up", "down", "energy")  # fmt: skip
    for each in ran:
        found = each.figures
        table.add_row(
            ", ".join(each.run.chosen) or each.run.folder.name, f"{found['rounds']}{'' if found['finished'] else ' !'}",
            _time(found["seconds"]), _number(found["loss"]), _number(found["held_out"]),
            *([_number(found["accuracy"])] if known else []),
            _size(found["bytes_up"]), _size(found["bytes_down"]), f"{found['joules'] / 3.6e6:,.3g} kWh",
        )  # fmt: skip
    console.print(table)
    if len(ran) == 1:
        console.print(_groups(ran[0]))


def _groups(ran: Ran) -> Table:
    table = Table("devices", "of them took part", "plan", "computing", "sending", "receiving", "waiting", "away")
    groups: dict[tuple[str, str], list[running.DeviceRow]] = {}
    for row in ran.outcome.devices:
        groups.setdefault((row.group, row.plan), []).append(row)
    for (group, plan), rows in groups.items():
        total = sum(row.computing + row.paused + row.sending + row.receiving + row.waiting + row.away for row in rows)
        shares = [
            f"{sum(getattr(row, kind) for row in rows) / total:.1%}" if total else "—"
            for kind in ("computing", "sending", "receiving", "waiting", "away")
        ]
        part = sum(row.rounds > 0 for row in rows)
        table.add_row(f"{len(rows)} x {group}", str(part), ", ".join(plan.split(", ")[:3]) or "never planned", *shares)
    return table


def _time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}"


def _size(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"
