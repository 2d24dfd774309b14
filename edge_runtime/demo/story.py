"""The demo from its first process to its last: a broker, a server and unlike devices, watched over MQTT."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live

from edge_runtime.config import Config, dump
from edge_runtime.demo import board as boards
from edge_runtime.demo import table
from edge_runtime.demo.board import Board
from edge_runtime.demo.limits import Limit, impose
from edge_runtime.demo.processes import Child, end, spawn, verb
from edge_runtime.errors import BaseModelError, WireError
from edge_runtime.wire import messages
from edge_runtime.wire.transport import Transport

PRECISIONS = ("nf4", "int8", "bf16")
"""What plans choose from; which one a device will choose, it alone knows."""


@dataclass(frozen=True)
class DemoDevice:
    """One device of the demo.

    Attributes:
        name: its client id.
        memory: bytes that the kernel lets it use.
        data: what it trains on.
    """

    name: str
    memory: int
    data: str


@dataclass(frozen=True)
class Story:
    """What the demo is asked to do.

    Attributes:
        config: the fleet's file, as all processes get it.
        devices: who takes part.
        base: the base model, as a person names it.
        out: folder for everything that remains.
    """

    config: Config
    devices: Sequence[DemoDevice]
    base: str
    out: Path


@dataclass(frozen=True)
class Ending:
    """How it ended.

    Attributes:
        board: the fleet at its end.
        limits: device name → its memory limit.
        seconds: from the first process to the last.
        failures: one sentence for each process that failed.
    """

    board: Board
    limits: dict[str, Limit]
    seconds: float
    failures: tuple[str, ...]


def play(story: Story, connect: Callable[[str], Transport], console: Console, stop: Callable[[], bool]) -> Ending:
    """Run the fleet to its end, or until `stop()`; every process that was started has ended when this returns.

    Args:
        story: what to do.
        connect: opens the onlooker's connection to the broker, which is running.
        console: where people look.
        stop: whether a person asked for the end.

    Raises:
        BaseModelError: the base could not be prepared.
        KeyboardInterrupt: `stop()` said yes; the same story goes on from where it was.
    """
    started = time.monotonic()
    file = story.out / "fleet.toml"
    file.write_text(dump(story.config), encoding="utf-8")
    with ExitStack() as stack:
        _prepare(story, console, stop)
        onlooker = connect(f"edge-{story.config.fleet.name}-onlooker")
        stack.callback(onlooker.close)
        for pattern in boards.patterns(story.config.fleet.name):
            onlooker.subscribe(pattern)
        limits = {
            device.name: impose(f"edge-runtime-{os.getpid()}-{device.name}", device.memory) for device in story.devices
        }
        children = _start(story, file, limits)
        stack.callback(end, children)
        board = _watch(children, onlooker, limits, console, stop)
        failures = tuple(filter(None, (child.failure() for child in children)))
    if stop():
        raise KeyboardInterrupt
    return Ending(board, limits, time.monotonic() - started, failures)


def _prepare(story: Story, console: Console, stop: Callable[[], bool]) -> None:
    """Convert the base in processes of their own, so that neither this one nor a small device ever does it."""
    for precision in PRECISIONS:
        arguments = verb("prepare", "--base", story.base, "--precision", precision)
        child = spawn("prepare", arguments, story.out / "logs" / "prepare.log")
        with console.status(f"preparing the base model at {precision} …"):
            while not child.ended and not stop():
                time.sleep(0.2)
        end([child])
        if child.process.returncode and not stop():
            raise BaseModelError(f"the base model could not be prepared: {child.last_words(1)}")
        console.print(f"[dim]{child.last_words(1)}[/dim]", highlight=False)
        if stop():
            return


def _start(story: Story, file: Path, limits: dict[str, Limit]) -> list[Child]:
    logs = story.out / "logs"
    server = verb("server", "--config", str(file), "--store", str(story.out / "server"))
    children = [spawn("server", server, logs / "server.log")]
    for device in story.devices:
        limit = limits[device.name]
        arguments = verb(
            "client", "--config", str(file), "--name", device.name, "--data", device.data, "--base", story.base,
            "--state-dir", str(story.out / "devices" / device.name),
            *(() if limit.group else ("--memory-limit", str(limit.bytes))),
        )  # fmt: skip
        children.append(spawn(device.name, arguments, logs / f"{device.name}.log", limit))
    return children


def _watch(
    children: Sequence[Child], onlooker: Transport, limits: dict[str, Limit], console: Console, stop: Callable[[], bool]
) -> Board:
    """Fold what the fleet says until all processes have ended and nothing more arrives."""
    board = Board()
    with _screen(console, limits) as show:
        while not stop():
            delivery = onlooker.receive(0.5)
            if delivery is None:
                if all(child.ended for child in children) or any(child.failure() for child in children):
                    break
                continue
            delivery.ack()
            try:
                board = boards.fold(board, messages.load(delivery.payload)) if delivery.payload else board
            except WireError as error:
                console.print(f"[red]{error}[/red]")
            show(board)
    return board


@contextmanager
def _screen(console: Console, limits: dict[str, Limit]) -> Iterator[Callable[[Board], None]]:
    """A live table on a terminal; one line for each change of state elsewhere."""
    if console.is_terminal:
        with Live(table.live(Board(), limits), console=console, refresh_per_second=4) as screen:
            yield lambda board: screen.update(table.live(board, limits))
        return
    said: dict[str, tuple[object, ...]] = {}

    def tell(board: Board) -> None:
        for name, row in board.rows.items():
            now = (row.report.state, row.report.round) if row.report else (row.online,)
            if said.get(name) != now:
                said[name] = now
                console.print(table.line(row), highlight=False, soft_wrap=True)

    yield tell
