"""A fleet of processes on a real broker, and the one who kills them.

Devices, server and broker are killed with SIGKILL in turn, at instants that a seed draws, and started again on the
state that they left. One of four instants lies while the victim of the last kill is still starting. Of the others,
every second waits until chunks are on their way, which on a fast link they are for a twentieth of the time only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from benchmarks.faults_part import BASE, FLEET
from edge_runtime.config import Config, dump, load
from edge_runtime.wire.broker import EmbeddedBroker, Settings, start

ROOT = Path(__file__).parents[1]
PATIENCE = 300.0
"""Seconds without any progress after which a fleet that nobody kills any more is stuck."""
LATE = 20.0
"""Seconds after the server's end after which a device that is still there needs it once more."""


@dataclass(frozen=True)
class Scenario:
    """One fleet and what happens to it.

    Attributes:
        broker: a row of `edge_runtime.wire.broker.BROKERS`.
        ranks: device → what it trains.
        layers: of the imaginary base.
        width: rows and columns of each layer.
        rounds: how many.
        kills: how many at most; a fleet that finishes sooner has seen fewer.
        gap: longest time between two kills, seconds.
        chunk_bytes: of the chunks, up and down.
        upload: what an upload takes, seconds, where nothing goes wrong.
        seed: draws the instants.
    """

    broker: str
    ranks: dict[str, int]
    layers: int
    width: int
    rounds: int
    kills: int
    gap: float = 3.0
    chunk_bytes: int = 120 * 1024
    upload: float = 0.03
    seed: int = 0

    @property
    def config(self) -> Config:
        """The fleet's file, but for its broker."""
        return load(
            None,
            [
                f"fleet.name={FLEET}",
                f"fleet.base={BASE}",
                f"rounds.num_rounds={self.rounds}",
                f"rounds.min_available_nodes={len(self.ranks)}",
                "rounds.progress_timeout=600",
                f"adapter.max_rank={max(self.ranks.values())}",
                "training.max_steps=4",
                "training.personal_steps=1",
                f"wire.chunk_bytes={self.chunk_bytes}",
                "wire.codec_up=fp16",
                "wire.codec_down=int8",
            ],
        )


@dataclass(frozen=True)
class Kill:
    """One of them.

    Attributes:
        victim: "device", "server" or "broker".
        name: which process.
        at: when, on the machine's monotonic clock.
    """

    victim: str
    name: str
    at: float


Launch = Callable[[Sequence[str]], Sequence[str]]
"""Command of a device → the command that runs it where the device lives, such as in another network namespace."""


@dataclass
class Fleet:
    """The processes of a scenario.

    Attributes:
        scenario: what it is.
        folder: for everything that they write.
        host: where the broker listens, and where the server finds it.
        seen_from_devices: HOST:PORT under which devices find the broker; None for the broker's own.
        launch: how a device's command is run.
        settings: of the broker.
    """

    scenario: Scenario
    folder: Path
    host: str = "127.0.0.1"
    seen_from_devices: str | None = None
    launch: Launch = field(default=lambda command: command)
    settings: Settings = field(default_factory=Settings)
    kills: list[Kill] = field(default_factory=list)
    reruns: int = 0

    def __post_init__(self) -> None:
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.draw = Random(self.scenario.seed)
        self._next = self._served = time.monotonic()
        self.folder.mkdir(parents=True)
        made = {
            "ranks": self.scenario.ranks, "layers": self.scenario.layers, "width": self.scenario.width,
        }  # fmt: skip
        (self.folder / "devices.json").write_text(json.dumps(made), encoding="utf-8")
        (self.folder / "fleet.toml").write_text(dump(self.scenario.config), encoding="utf-8")
        self.broker: EmbeddedBroker = start(
            self.scenario.broker, store=self.folder / "broker", host=self.host, settings=self.settings
        )

    def begin(self, name: str) -> None:
        """Start the server or a device, for the first time or again: always with the same command."""
        address = str(self.broker.address)
        if name != "server" and self.seen_from_devices:
            address = self.seen_from_devices.replace("PORT", str(self.broker.address.port))
        (self.folder / f"{name}.up").unlink(missing_ok=True)
        command: Sequence[str] = [sys.executable, "-m", "benchmarks.faults_part", name, str(self.folder), address]
        if name != "server":
            command = self.launch(command)
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def run(self) -> Fleet:
        """Begin, kill, and wait for the end of all.

        Raises:
            TimeoutError: the fleet is stuck, or a process failed by itself.
        """
        try:
            for name in ("server", *self.scenario.ranks):
                self.begin(name)
            self._kill_in_turn()
            self._finish()
            told = json.dumps([vars(kill) for kill in self.kills])
            (self.folder / "kills.json").write_text(told, encoding="utf-8")
        finally:
            self.end()
        return self

    def end(self) -> None:
        """End whatever still runs."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()
        self.broker.stop()

    # ── killing ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _kill_in_turn(self) -> None:
        devices = list(self.scenario.ranks)
        time.sleep(self.draw.uniform(0, self.scenario.gap))
        for number in range(self.scenario.kills):
            if number % 2:
                self._await_chunks(self.draw.uniform(0, self.scenario.upload))
            self._check()
            if self.running("server") is None:
                return  # the fleet has finished
            victim = ("device", "server", "broker")[number % 3]
            name = devices[number // 3 % len(devices)] if victim == "device" else victim
            self._kill(victim, name)
            while time.monotonic() < self._next:
                self._check()
                time.sleep(0.02)

    def _kill(self, victim: str, name: str) -> None:
        down = self.draw.choice((0.0, self.draw.uniform(0, 1.5)))
        still_starting = self.draw.random() < 0.25
        gap = self.draw.uniform(0.05, 0.6 if still_starting else self.scenario.gap)
        if victim == "broker":
            self.broker.kill()
            self.kills.append(Kill(victim, name, time.monotonic()))
            time.sleep(down)
            self.broker.start()
        else:
            process = self.running(name)
            if process is not None:
                process.kill()
                process.wait()
                self.kills.append(Kill(victim, name, time.monotonic()))
                time.sleep(down)
                self.begin(name)
                if not still_starting:
                    self._await_service(name)
        self._next = time.monotonic() + gap

    def _await_chunks(self, then: float) -> None:
        """Wait until some device sends chunks, and so many seconds more; or not at all if none does for a while."""
        journals = [self.folder / "journal" / f"{name}.jsonl" for name in self.scenario.ranks]
        began = time.monotonic()
        while time.monotonic() - began < 4 * self.scenario.gap:
            if any(b'"sent"' in last(path) for path in journals):
                time.sleep(then)
                return
            time.sleep(0.002)

    def _await_service(self, name: str) -> None:
        deadline = time.monotonic() + 20.0
        while self.running(name) and not (self.folder / f"{name}.up").exists() and time.monotonic() < deadline:
            time.sleep(0.02)

    def running(self, name: str) -> subprocess.Popen[bytes] | None:
        """The process of that name, if it lives."""
        process = self.processes[name]
        return process if process.poll() is None else None

    def _check(self) -> None:
        for name, process in self.processes.items():
            code = process.poll()
            if code:
                raise TimeoutError(f"'{name}' ended by itself with code {code}: {self.said(name)}")
        if self.running("server"):
            self._served = time.monotonic()
        elif any(map(self.running, self.scenario.ranks)) and time.monotonic() - self._served > LATE:
            # Who was away when the fleet finished asks the broker alone, and a killed one may have forgotten.
            # The server's own command says it again.
            self.reruns += 1
            self.begin("server")

    def said(self, name: str) -> str:
        """The last of what a process wrote."""
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-1500:]

    def _finish(self) -> None:
        """Wait until everybody has left; only a fleet in which nothing moves any more is stuck."""
        seen, since = -1, time.monotonic()
        while any(self.running(name) for name in self.processes):
            self._check()
            moved = sum(path.stat().st_size for path in (self.folder / "journal").glob("*.jsonl"))
            if moved != seen:
                seen, since = moved, time.monotonic()
            if time.monotonic() - since > PATIENCE:
                logs = " || ".join(f"{name}: {self.said(name)}" for name in self.processes)
                raise TimeoutError(f"nothing moved for {PATIENCE:.0f} s: {logs}")
            time.sleep(0.1)
        self._check()


def last(path: Path) -> bytes:
    """The last line of a file, or what there is of it."""
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 400))
        return file.read().rstrip(b"\n").rpartition(b"\n")[2]
