"""`edge-runtime demo`: the whole path on this machine, with figures and a picture at the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from edge_runtime import config as settings
from edge_runtime.cli import shell
from edge_runtime.config import Config
from edge_runtime.demo import plot, report, table
from edge_runtime.demo.board import bytes_as_fp32
from edge_runtime.demo.story import DemoDevice, Ending, Story, play
from edge_runtime.errors import ConfigError, unknown_name
from edge_runtime.wire import broker as embedded
from edge_runtime.wire.topics import valid_name

DEVICES = ("pi:620M:stdlib-docs:text", "nano:700M:stdlib-docs:networking", "laptop:2400M:stdlib-docs:numbers")
"""Unlike in memory, and so in plan; unlike in data, so that they have something to tell each other."""

SHORT = ("training.max_steps=12", "training.personal_steps=10", "device.eval_examples=16")
"""So that three devices on two cores are done within minutes; `--set` overrides them."""

KEPT_FOR_RESUME = ("broker", "server", "devices", "logs")


def run(
    rounds: int, devices: Sequence[str], base: str, method: str, broker: str, out: Path, file: Path | None,
    overrides: Sequence[str],
) -> int:  # fmt: skip
    """Play the demo; 0 when every device left with its adapter, 1 when a process failed."""
    fleet = [_device(text) for text in devices or DEVICES]
    if len({device.name for device in fleet}) != len(fleet):
        raise ConfigError(f"devices need different names; found {', '.join(device.name for device in fleet)}")
    config = _config(rounds, fleet, base, method, file, overrides)
    shell.check_names(config)
    _check_broker(broker)
    console = Console(highlight=False)
    stop = shell.stop_on_signals()
    _clear(out, config, console)
    with ExitStack() as stack:
        config = _with_running_broker(config, broker, out, stack)
        console.print(f"[bold]edge-runtime demo[/bold]: {len(fleet)} devices, {rounds} rounds, method {method}, "
                      f"broker {config.broker.host}:{config.broker.port}, everything in {out}/")  # fmt: skip
        story = Story(config, fleet, base, out)
        ending = play(story, lambda name: shell.connect(config, name, console.print, stop), console, stop)
    return _tell(ending, story, console)


def _device(text: str) -> DemoDevice:
    name, colon, rest = text.partition(":")
    memory, second, data = rest.partition(":")
    if not (colon and second and data):
        raise ConfigError(f"--device takes NAME:MEMORY:DATA, such as pi:900M:stdlib-docs:text; found {text!r}")
    return DemoDevice(valid_name(name, "device"), shell.size(memory), data)


def _config(
    rounds: int, fleet: Sequence[DemoDevice], base: str, method: str, file: Path | None, overrides: Sequence[str]
) -> Config:
    threads = max(1, (os.cpu_count() or 1) // len(fleet))
    demo = (
        f"rounds.num_rounds={rounds}", f"rounds.min_available_nodes={len(fleet)}", f"aggregator.method={method}",
        f"device.threads={threads}", f"device.base={json.dumps(base)}", "fleet.name=demo", *SHORT,
    )  # fmt: skip
    return settings.load(file, [*demo, *overrides])


def _clear(out: Path, config: Config, console: Console) -> None:
    """Go on with an interrupted demo of the same settings; otherwise begin anew, in the demo's own folders only."""
    out.mkdir(parents=True, exist_ok=True)
    wanted = settings.dump(config)
    mark = out / "unfinished.toml"
    if mark.exists() and mark.read_text(encoding="utf-8") == wanted:
        console.print(f"going on with the interrupted demo in {out}/")
        return
    for folder in KEPT_FOR_RESUME:
        shutil.rmtree(out / folder, ignore_errors=True)
    mark.write_text(wanted, encoding="utf-8")


def _check_broker(broker: str) -> None:
    """A bare name is no host here: it is more likely a broker's name, misspelt, and would be looked for in vain."""
    if broker not in embedded.BROKERS and ":" not in broker:
        raise ConfigError(unknown_name("broker", broker, [*embedded.BROKERS, "HOST:PORT"]))


def _with_running_broker(config: Config, broker: str, out: Path, stack: ExitStack) -> Config:
    if broker not in embedded.BROKERS:
        return shell.with_broker(config, broker)
    running = stack.enter_context(embedded.start(broker, store=out / "broker"))
    return shell.with_broker(config, str(running.address))


def _tell(ending: Ending, story: Story, console: Console) -> int:
    """Table, picture, files and the RESULT line."""
    metrics = story.out / "server" / "metrics.jsonl"
    outcome = report.result(ending, metrics)
    figures = outcome["figures"]
    for limit in list(ending.limits.values())[:1]:
        console.print(f"[dim]memory limits: {limit.reason}[/dim]")
    console.print(table.final(ending.board, ending.limits))
    if figures["bytes_ratio"] is not None:
        errors = ", ".join(f"{error:.2%}" for error in figures["truncation"])
        console.print(
            f"moved {figures['bytes_ratio']:.0%} of what fp32 adapters would take; truncation error by round: {errors}"
        )
        _draw(ending, story, metrics, figures["seconds"])
    if metrics.exists():  # not if the server failed before anything happened
        shutil.copyfile(metrics, story.out / "metrics.jsonl")
    (story.out / "result.json").write_text(json.dumps(outcome, indent=2), encoding="utf-8")
    for failure in ending.failures:
        console.print(f"[red]{failure}[/red] (log in {story.out}/logs/)")
    if not ending.failures:
        (story.out / "unfinished.toml").unlink(missing_ok=True)
        console.print(f"personal adapters: {story.out}/devices/*/personal   picture: {story.out}/demo.png   "
                      f"metrics: {story.out}/metrics.jsonl")  # fmt: skip
    print("RESULT " + json.dumps(outcome), flush=True)  # noqa: T201  the contract of benchmarks: the last line of stdout
    return 1 if ending.failures else 0


def _draw(ending: Ending, story: Story, metrics: Path, seconds: float) -> None:
    title = (
        f"{len(story.devices)} unlike devices, {story.base}, method {story.config.aggregator.method}, {seconds:.0f} s"
    )
    fp32 = bytes_as_fp32(ending.board)
    plot.draw(ending.board, report.truncations(metrics), fp32, story.out / "demo.png", title)
