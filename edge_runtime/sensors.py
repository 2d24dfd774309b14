"""What this machine says of itself while it works: battery, temperature, a person at it, processes that were killed.

Readings for `governor` come from `profiles.sensors`, terminals and psutil; counts for `survival` from /proc and the own
control group. A sensor that is missing or fails is None: a device without a thermometer trains like any other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from edge_runtime.governor import Readings
from edge_runtime.survival import Kernel
from profiles import cgroups, sensors
from profiles.machine import Machine

# The kernel notes the time of a terminal's input every 8 seconds.
TERMINALS = "dev/pts"

_FAILURES = (OSError, ValueError, KeyError, AttributeError, RuntimeError, NotImplementedError, psutil.Error)


@dataclass(frozen=True)
class _Load:
    """Processor seconds so far, and when that was read."""

    at: float
    busy: float
    own: float


class Sensors:
    """Reads the machine when called; remembers the last reading of the processor's load.

    A person is at the device when a terminal was typed into within `user_idle_seconds`, or when other processes took
    more than `user_cpu_share` of the processors since the last reading (a browser, a compiler: windows leave no trace
    in terminals). The time of a terminal's *input* counts, not of its output, which may be our own.

    Args:
        user_idle_seconds: how long ago the last key may have been pressed.
        user_cpu_share: of all processors, in (0, 1].
        root: the folder that holds /proc, /sys and /dev.
        now: seconds since the epoch, as file times are.
    """

    def __init__(
        self,
        *,
        user_idle_seconds: float,
        user_cpu_share: float,
        root: Path = Path("/"),
        now: Callable[[], float] = time.time,
    ) -> None:
        self._idle, self._share, self._root, self._now = user_idle_seconds, user_cpu_share, root, now
        self._load: _Load | None = None

    def __call__(self) -> Readings:
        """What the sensors say now."""
        machine = Machine(self._root)
        battery = _tried(lambda: sensors.battery(machine))
        heat = _tried(lambda: sensors.temperature(machine).value)
        return Readings(
            battery_percent=None if battery is None else battery.percent,
            on_battery=battery is not None and battery.discharging,
            temperature_celsius=heat,
            user_active=self._user(),
        )

    def _user(self) -> str | None:
        typed, share = _tried(self._typed), _tried(self._others)
        if typed is not None and typed <= self._idle:
            return f"somebody typed {typed:.0f} s ago; training waits until {self._idle:g} s have passed"
        if share is not None and share > self._share:
            return f"other programs take {share:.0%} of the processors; training waits until it is {self._share:.0%}"
        return None if typed is None and share is None else ""

    def _typed(self) -> float | None:
        """Seconds since a key was pressed in any terminal; None where there is no terminal."""
        terminals = (self._root / TERMINALS).glob("[0-9]*")
        last = max((terminal.stat().st_atime for terminal in terminals), default=None)
        return None if last is None else max(0.0, self._now() - last)

    def _others(self) -> float | None:
        """Share of all processors that other processes took since the last reading; None at the first."""
        before, self._load = self._load, _load(self._now())
        if before is None or self._load.at <= before.at:
            return None
        seconds = (self._load.at - before.at) * (psutil.cpu_count() or 1)
        others = (self._load.busy - before.busy) - (self._load.own - before.own)
        return min(1.0, max(0.0, others / seconds))


def kernel(root: Path = Path("/")) -> Kernel:
    """What the kernel has counted so far.

    Args:
        root: the folder that holds /proc and /sys.
    """
    group, kills = _tried(lambda: _group(root)) or ("", None)
    return Kernel(
        boot=_tried(lambda: (root / "proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()) or "",
        machine_kills=_tried(lambda: _count(root / "proc/vmstat")),
        group_kills=kills,
        group=group,
    )


def _group(root: Path) -> tuple[str, int | None]:
    """The nearest control group that counts kills of this process, this life of it, and its count.

    Version 2 counts in every group up the tree. Version 1 counts in the process's own group alone, so an ancestor's
    count would acquit the kernel of a kill that it did.
    """
    for limit in cgroups.memory_limits(root):
        folder = Path(limit.path).parent
        file = folder / "memory.events"
        if not file.is_file() and str(os.getpid()) in (folder / "cgroup.procs").read_text(encoding="utf-8").split():
            file = folder / "memory.oom_control"
        kills = _count(file) if file.is_file() else None
        if kills is not None:
            # The number of the folder is another one when a service manager makes the group anew.
            return f"{folder}#{folder.stat().st_ino}", kills
    return "", None


def _count(file: Path) -> int | None:
    """The number after `oom_kill` in a table of names and numbers; old kernels do not have it."""
    rows = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
    return next((int(row[1]) for row in rows if len(row) == 2 and row[0] == "oom_kill"), None)


def _load(at: float) -> _Load:
    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Linux counts the time of guests as user time too.
    twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return _Load(at, sum(times) - idle - twice, own.user + own.system)


def _tried(read: Callable[[], Any]) -> Any:
    """What was read, or None: a sensor that fails is one that is missing."""
    try:
        return read()
    except _FAILURES:
        return None
