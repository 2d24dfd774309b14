"""How much memory this process has resident, and had at most.

Not by getrusage: its ru_maxrss outlives fork and exec, so a small child of a large parent shows the parent's peak.
"""

from __future__ import annotations

from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """The largest resident set of this process so far (VmHWM), pages of files included."""
    return resident("VmHWM")


def resident(key: str) -> int:
    """One of the sizes in proc_pid_status(5), in bytes.

    Raises:
        SystemExit: this system has no such thing.
    """
    for line in STATUS.read_text(encoding="utf-8").splitlines() if STATUS.is_file() else ():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise SystemExit(f"{STATUS} has no {key}; this benchmark needs Linux")
