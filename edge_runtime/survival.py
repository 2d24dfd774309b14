"""Whether a process was killed for its memory, and how much less to use after that. Pure.

A process that the kernel kills says nothing. So before it fills its memory it writes down what it is about to do, how
much that will take, and what the kernel has counted so far (`Mark`), and wipes the mark when it is done or ends in
order. Whoever starts and finds a mark compares it with what the kernel says now.

Source: Linux kernel documentation, admin-guide/cgroup-v2.rst (memory.events) and admin-guide/cgroup-v1/memory.rst
(memory.oom_control); `oom_kill` in /proc/vmstat counts every such kill on the machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from edge_runtime.errors import ConfigError

STEP_DOWN = 0.9
"""A plan that did not fit is followed by one that is predicted to need at most this share of it."""

Verdict = Literal["memory", "other"]


@dataclass(frozen=True)
class Kernel:
    """What the kernel says.

    Attributes:
        boot: id of this boot; empty where the system has none.
        machine_kills: processes that were killed for memory since the boot, on the whole machine; None if unknown.
        group_kills: the same for this process's own control group; None if unknown or if there is none.
        group: names that group and this life of it: a group that is made anew begins to count anew.
    """

    boot: str = ""
    machine_kills: int | None = None
    group_kills: int | None = None
    group: str = ""


@dataclass(frozen=True)
class Mark:
    """Work that has begun and has not ended.

    Attributes:
        doing: the work, in words that follow "while".
        predicted_peak_bytes: what its plan says that the process needs.
        kernel: what the kernel said when it began.
    """

    doing: str
    predicted_peak_bytes: int
    kernel: Kernel = field(default_factory=Kernel)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `from_json` restores an equal mark."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Mark:
        """The mark that `to_json` wrote.

        Raises:
            ConfigError: it is no such mark.
        """
        try:
            return cls(str(data["doing"]), int(data["predicted_peak_bytes"]), Kernel(**data["kernel"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the device's state holds a mark of unfinished work that cannot be read ({error}); "
                "was it written by a newer version? choose another folder with --state-dir"
            ) from error


def verdict(mark: Mark, now: Kernel) -> Verdict:
    """Why the marked work never ended: "memory" (the kernel killed it) or "other" (power cut, reboot, kill -9).

    The same boot, and a count of kills that grew, or none that can be read, means memory. The machine's count grows
    for other processes' kills too, so the own group's count acquits where the group is still the one of the mark.
    """
    then = mark.kernel
    if not now.boot or then.boot != now.boot:
        return "other"
    own = _grew(then.group_kills, now.group_kills) if then.group == now.group else None
    if own is not None:
        return "memory" if own else "other"
    return "other" if _grew(then.machine_kills, now.machine_kills) is False else "memory"


def lowered(ceiling: int | None, predicted_peak_bytes: int) -> int:
    """The memory ceiling (bytes) after a plan of that predicted peak did not fit; never above the former one.

    Raises:
        ValueError: a peak that is not positive: there was no plan to blame.
    """
    if predicted_peak_bytes < 1:
        raise ValueError(f"a plan needs memory; found a predicted peak of {predicted_peak_bytes} bytes")
    below = int(STEP_DOWN * predicted_peak_bytes)
    return below if ceiling is None else min(ceiling, below)


def _grew(before: int | None, now: int | None) -> bool | None:
    return None if before is None or now is None else now > before
