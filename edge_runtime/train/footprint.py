"""How much memory this process takes, and what its peak was since a moment that somebody chose.

What counts is what no kernel can take away: resident pages, less those that files back. The kernel keeps a peak
(VmHWM), which can be set back to the present (clear_refs, Linux 4.0); where it cannot, the peak is that of samples.

Source: proc_pid_status(5), VmHWM and RssFile; proc_pid_clear_refs(5), value 5.
"""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import psutil
import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class Footprint:
    """Watches this process's memory.

    Args:
        reset: where the kernel's peak is set back; a test gives a file that does not exist.
    """

    def __init__(self, reset: Path = CLEAR_REFS) -> None:
        self._reset = reset
        self._life = self._sampled = self._files = 0
        self._exact = False
        self.begin()

    @property
    def peak_bytes(self) -> int:
        """The peak of the process's life."""
        return max(self._life, self._host_peak(), self._sampled)

    def since_begin(self, pool: str) -> int:
        """The peak since `begin`, in bytes of a memory pool: "host", "gpu" or "shared" (`DeviceProfile.pool`)."""
        host = self._host_peak() if self._exact else self._sampled
        card = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
        return {"host": host, "gpu": card, "shared": host + card}[pool]

    def begin(self) -> None:
        """From now on a new peak counts."""
        self._life = self.peak_bytes
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._exact = self._set_back()
        self._sampled, self._files = host_bytes(), file_bytes()

    def sample(self) -> None:
        """Take the present as a peak, if it is one; needed where the kernel's own cannot be set back."""
        self._sampled, self._files = max(self._sampled, host_bytes()), max(self._files, file_bytes())

    def _host_peak(self) -> int:
        """The kernel's peak, less the most pages that files were seen to back: it keeps no peak of those alone."""
        self._files = max(self._files, file_bytes())
        return host_peak_bytes() - (self._files - file_bytes())

    def _set_back(self) -> bool:
        """Whether the kernel's peak is now the present."""
        if not self._reset.exists():
            return False
        try:
            self._reset.write_text("5", encoding="ascii")
        except OSError:
            return False  # a container may forbid it; samples do then
        # An old kernel takes the 5 and does nothing: a peak far above the present was not set back.
        return host_peak_bytes() - host_bytes() < 1 << 24


def host_bytes() -> int:
    """Bytes that this process has to itself in the host's memory now."""
    table = _status()
    if "VmRSS" in table:
        return table["VmRSS"] - table.get("RssFile", 0)
    return int(psutil.Process().memory_info().rss)


def file_bytes() -> int:
    """Resident bytes that files back now."""
    return _status().get("RssFile", 0)


def host_peak_bytes() -> int:
    """The kernel's peak of them; pages that files back are taken off as they are now, for it keeps no peak of those."""
    table = _status()
    if "VmHWM" in table:
        return table["VmHWM"] - table.get("RssFile", 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status() -> dict[str, int]:
    if not STATUS.is_file():
        return {}
    rows = re.findall(r"^(\w+):\s+(\d+) kB", STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: int(size) * 1024 for name, size in rows}
