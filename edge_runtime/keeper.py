"""What keeps a device alive while it works: the memory ceiling and the mark on its disk, and the gate it waits in.

The decisions are pure (`survival`, `governor`); this is their shell: it reads sensors and clock, and writes the disk.

    fact "memory_ceiling"   bytes that plans stay below, because a plan above them did not fit; never forgotten
    fact "unfinished"       the work that has begun and has not ended: see `survival.Mark`
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_runtime import governor, survival
from edge_runtime.errors import DeviceMemoryError
from edge_runtime.state import DeviceState
from edge_runtime.trainer import Gate

CEILING, UNFINISHED = "memory_ceiling", "unfinished"
TELL_SECONDS = 10.0
"""How often a device that pauses says so."""
LOOK_SECONDS = 0.5
"""How soon a device that pauses notices that it shall stop."""
MIB = 2**20


@dataclass(frozen=True)
class Watch:
    """Where a device looks while it works. The defaults look at nothing.

    Attributes:
        thresholds: when training pauses.
        sense: reads the sensors.
        check_every: seconds between two readings.
        kernel: reads what the kernel has counted.
        stop: whether somebody asked this process to end.
        clock: seconds, monotonic.
        wait: sleeps so many seconds.
    """

    thresholds: governor.Thresholds = field(default_factory=governor.Thresholds)
    sense: Callable[[], governor.Readings] = governor.Readings
    check_every: float = 10.0
    kernel: Callable[[], survival.Kernel] = survival.Kernel
    stop: Callable[[], bool] = lambda: False
    clock: Callable[[], float] = time.monotonic
    wait: Callable[[float], None] = time.sleep


class Keeper:
    """Keeps one device alive.

    Args:
        disk: where ceiling and mark are kept.
        watch: where it looks.
        say: told a sentence for people.
    """

    def __init__(self, disk: DeviceState, watch: Watch, *, say: Callable[[str], None]) -> None:
        self._disk, self._watch, self._say, self._clock = disk, watch, say, watch.clock
        self._predicted = 0
        self._marked = False
        self._governor = governor.State()
        self._looked: float | None = None

    @property
    def ceiling(self) -> int | None:
        """Bytes that a plan must stay below; None before any plan failed."""
        found = self._disk.fact(CEILING)
        return None if found is None else int(found)

    def woken(self) -> str:
        """Judge the mark that a former process left, if there is one; what the server should know of it, or ''."""
        found = self._disk.fact(UNFINISHED)
        if found is None:
            return ""
        mark = survival.Mark.from_json(found)
        if survival.verdict(mark, self._watch.kernel()) == "other":
            self._say(f"this device ended while {mark.doing}, but not for want of memory; it goes on as before")
            self._disk.put_fact(UNFINISHED, None)
            return ""
        # The ceiling first: a crash between the two writes judges the same mark again, which changes nothing.
        told = self._lower(
            f"the kernel killed this device for its memory while {mark.doing}", mark.predicted_peak_bytes
        )
        self._disk.put_fact(UNFINISHED, None)
        return told

    def planned(self, predicted_peak_bytes: int) -> None:
        """A plan of that predicted peak is about to be loaded."""
        self._predicted = predicted_peak_bytes
        self.begin("loading the base model")

    def begin(self, doing: str) -> None:
        """Write down, durably, that this work begins; before there is a plan, there is nothing to write."""
        if self._predicted:
            mark = survival.Mark(doing, self._predicted, self._watch.kernel())
            self._disk.put_fact(UNFINISHED, mark.to_json())
            self._marked = True

    def end(self) -> None:
        """The work ended, well or in an orderly failure."""
        if self._marked:
            self._disk.put_fact(UNFINISHED, None)
            self._marked = False

    def exhausted(self, error: DeviceMemoryError) -> str:
        """Lower the ceiling below the plan that did not fit; what the server should know of it.

        Raises:
            DeviceMemoryError: the error itself, where memory ran out before there was a plan to lower.
        """
        blamed, self._predicted = self._predicted, 0
        if not blamed:
            raise error
        return self._lower(str(error), blamed)

    def gate(self, tell: Callable[[str], None]) -> Gate:
        """What training asks before each micro-batch: it waits while the governor says pause; True means stop.

        Args:
            tell: told the reason, at once and then every `TELL_SECONDS`, for as long as the pause lasts.
        """
        return lambda: self._watch.stop() or (self._pauses() and self._waits(tell))

    def _lower(self, why: str, blamed: int) -> str:
        ceiling = survival.lowered(self.ceiling, blamed)
        self._disk.put_fact(CEILING, ceiling)
        told = (
            f"{why}; a plan of {blamed / MIB:.0f} MiB did not fit, so from now on plans stay below "
            f"{ceiling / MIB:.0f} MiB (another --state-dir forgets this)"
        )
        self._say(told)
        return told

    def _pauses(self) -> bool:
        """Look at the sensors if it is time to; whether training must wait."""
        now = self._clock()
        due = self._looked is None or now - self._looked >= self._watch.check_every
        if due and self._watch.thresholds.any:
            self._looked = now
            self._governor = governor.step(self._watch.thresholds, self._governor, self._watch.sense())
        return self._governor.paused

    def _waits(self, tell: Callable[[str], None]) -> bool:
        """Wait until the governor says go (False), or somebody says stop (True)."""
        self._say(f"training pauses: {self._governor.reason}")
        told: float | None = None
        while self._pauses():
            now = self._clock()
            if told is None or now - told >= TELL_SECONDS:
                told = now
                tell(self._governor.reason)
            if self._watch.stop():
                return True
            self._watch.wait(min(LOOK_SECONDS, self._watch.check_every))
        self._say("training goes on")
        return False
