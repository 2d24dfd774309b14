"""What a device does whose disk is full: it says so, to people and to the server, and waits until there is room.

A write that did not fit has changed nothing, so it is simply tried again; nothing that the device has is given up. The
connection lives on meanwhile: its network thread needs no disk.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_runtime.errors import DiskFullError
from edge_runtime.keeper import TELL_SECONDS, Watch

RETRY_SECONDS = 2.0
"""Between two tries."""


def waiting(watch: Watch, say: Callable[[str], None], tell: Callable[[str], None]) -> Callable[[DiskFullError], None]:
    """What to do about a write that did not fit: wait a little, for another try.

    Args:
        watch: clock, `wait` and `stop`.
        say: told a sentence for people, at first and then every `TELL_SECONDS`.
        tell: tells the server the reason, likewise.

    Returns:
        A function for `DeviceState.on_full`; it raises KeyboardInterrupt when somebody asked this process to end.
    """
    told: float | None = None

    def wait(error: DiskFullError) -> None:
        nonlocal told
        if watch.stop():
            raise KeyboardInterrupt
        now = watch.clock()
        if told is None or now - told >= TELL_SECONDS:
            told = now
            say(f"{error}; this device waits and tries again")
            tell(str(error))
        watch.wait(RETRY_SECONDS)

    return wait
