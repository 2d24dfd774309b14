"""One fleet's file, run by real processes over Mosquitto and in virtual time, and what either way left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from edge_runtime.lora.adapter import Adapter
from edge_runtime.wire.broker import start
from server.aggregators.beside import published
from server.aggregators.method import load_state
from server.store import Store

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Round:
    """One round of a fleet.

    Attributes:
        seconds: from the moment at which it was asked for to its merge.
        devices: device → seconds that it worked for the round: evaluation and training.
    """

    seconds: float
    devices: dict[str, float]


@dataclass(frozen=True)
class Ran:
    """What a run of the fleet left.

    Attributes:
        rounds: in their order.
        versions: digests of the global adapter, from version 0 on.
        last: the last global adapter.
        plans: device → its plan in words.
    """

    rounds: list[Round]
    versions: list[str]
    last: Adapter
    plans: dict[str, str]


def command(folder: Path, *arguments: str, core: int | None = None, out: int | None = None) -> subprocess.Popen[bytes]:
    """Start a verb of the product with one thread, on a core of its own where a number is given.

    Args:
        folder: where it runs, and where its log goes.
        arguments: of the product.
        core: its number, modulo all.
        out: where its standard output goes; the log when absent.
    """
    with _on(core), (folder / f"{arguments[0]}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "edge_runtime.cli", *arguments],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=log if out is None else out,
            stderr=log,
        )


@contextmanager
def _on(core: int | None) -> Iterator[None]:
    """Within it, processes that are started have that core alone."""
    if core is None:
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(allowed)[core % len(allowed)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def said(folder: Path, *arguments: str, core: int | None = None) -> str:
    """What a verb prints until its good end.

    Raises:
        RuntimeError: it ended badly; with the end of its log.
    """
    running = command(folder, *arguments, core=core, out=subprocess.PIPE)
    out, _ = running.communicate()
    _well(running, folder / f"{arguments[0]}.log")
    return out.decode()


def _well(running: subprocess.Popen[bytes], log: Path) -> None:
    if running.wait():
        raise RuntimeError(f"a process ended with {running.returncode}: {log.read_text()[-2000:]}")


@contextmanager
def broker(folder: Path) -> Iterator[int]:
    """A Mosquitto; gives its port."""
    found = start("mosquitto", store=folder / "broker")
    try:
        yield found.address.port
    finally:
        found.stop()


def really(file: Path, folder: Path) -> Ran:
    """Deal the simulated devices' data, and run server and clients to their end, each client on a core of its own."""
    folder.mkdir()
    dealt = [json.loads(line) for line in said(folder, "simulate", str(file), "--deal", "dealt", "--json").splitlines()]
    running = {"server": command(folder, "server", "--config", str(file), "--store", "server")}
    try:
        for core, each in enumerate(dealt):
            running[each["device"]] = command(folder, "client", "--config", each["configuration"], core=core)
        for name, process in running.items():
            _well(process, folder / ("server.log" if name == "server" else "client.log"))
    finally:
        for process in running.values():
            if process.poll() is None:
                process.kill()
            process.wait()
    events = _lines(folder / "server" / "metrics.jsonl")
    return Ran(
        real_rounds(events), *_adapters(folder / "server"),
        {event["client"]: event["detail"] for event in events if event.get("state") == "planned"},
    )  # fmt: skip


def simulated(file: Path, folder: Path) -> Ran:
    """The same in virtual time."""
    folder.mkdir()
    said(folder, "simulate", str(file), "--out", ".", "--no-draw", "--json", core=0)
    events = _lines(folder / "events.jsonl")
    plans = {event["device"]: event["plan"] for event in events if event["event"] == "device"}
    return Ran(virtual_rounds(events), *_adapters(folder / "server"), plans)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _adapters(folder: Path) -> tuple[list[str], Adapter]:
    """The digests of a store's versions, and the last one."""
    store = Store(folder)
    try:
        stored = [found for number in store.versions() if (found := store.version(number)) is not None]
        adapters = [published(load_state(each.state)) for each in stored]
    finally:
        store.close()
    return [adapter.digest() for adapter in adapters], adapters[-1]


def real_rounds(events: Sequence[dict[str, Any]]) -> list[Round]:
    """From the server's record: the first begins when a device first fetches, each other one with a merge."""
    timed = [(datetime.fromisoformat(event["time"]).timestamp(), event) for event in events]
    merged = {event["round"]: at for at, event in timed if event["event"] == "merge"}
    rounds = []
    for number in sorted(merged):
        told = [(at, event) for at, event in timed if event["event"] == "report" and event["round"] == number]
        # The end of all is told of as the last round as well, so the first time counts.
        fetching, working, offering = (
            {event["client"]: at for at, event in reversed(told) if event["state"] == state}
            for state in ("fetching", "evaluating", "offering")
        )
        begin = merged.get(number - 1, min(fetching.values()))
        devices = {name: offering[name] - working[name] for name in sorted(offering)}
        rounds.append(Round(merged[number] - begin, devices))
    return rounds


def virtual_rounds(events: Sequence[dict[str, Any]]) -> list[Round]:
    """From a simulation's events: each from its directive to its version."""
    merged = {event["round"]: event["t"] for event in events if event["event"] == "version"}
    rounds = []
    for number in sorted(merged):
        asked = [event["t"] for event in events if event["event"] == "directive" and event["round"] == number]
        devices: dict[str, float] = {}
        for event in events:
            if event["event"] == "span" and (event["kind"], event["round"]) == ("computing", number):
                devices[event["device"]] = devices.get(event["device"], 0.0) + event["to"] - event["from"]
        rounds.append(Round(merged[number] - min(asked), dict(sorted(devices.items()))))
    return rounds
