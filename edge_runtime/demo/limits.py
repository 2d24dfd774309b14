"""Memory limits that the kernel enforces, so that a device of the demo can really run out of memory.

cgroup v1 and v2 are tried; where neither may be written (no root, no such system), the limit is only declared to the
device with `--memory-limit`, and the demo says so.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")

FILES: Mapping[str, tuple[str, str, str]] = {
    # kind: folder below the root, file of the memory limit, file of the limit of memory and swap
    "v1": ("memory", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
    "v2": ("", "memory.max", "memory.swap.max"),
}


@dataclass(frozen=True)
class Limit:
    """A memory limit of one process and its children.

    Attributes:
        bytes: the limit.
        group: the cgroup's folder, or None when the limit is only declared.
        reason: why it is enforced, or why not.
    """

    bytes: int
    group: Path | None
    reason: str

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line that runs these arguments under the limit."""
        if self.group is None:
            return list(arguments)
        # The shell moves itself into the group and becomes the program: nothing ever runs outside the limit.
        return ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(self.group), *arguments]

    def release(self) -> None:
        """Remove the group; its processes must have ended."""
        for _ in range(20):
            try:
                if self.group is not None:
                    self.group.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.1)  # the kernel empties a group a moment after its last process has gone
            else:
                return


def impose(name: str, limit: int, root: Path = ROOT) -> Limit:
    """A limit of that many bytes, enforced by a new cgroup where this machine allows it."""
    causes = []
    for kind, (folder, memory, swap) in FILES.items():
        group = root / folder / name
        if not (root / folder / memory).exists() and not (root / "cgroup.subtree_control").exists():
            continue
        try:
            group.mkdir()
        except OSError as error:
            causes.append(f"{kind}: {error}")
            continue
        try:
            (group / memory).write_text(str(limit))
            if (group / swap).exists():
                # Without this a device would swap where a real one dies.
                (group / swap).write_text(str(limit) if kind == "v1" else "0")
            found = int((group / memory).read_text())
        except (OSError, ValueError) as error:
            causes.append(f"{kind}: {error}")
            group.rmdir()
            continue
        return Limit(found, group, f"enforced by cgroup {kind}")
    return Limit(limit, None, f"declared only ({'; '.join(causes) or 'no memory cgroups here'})")
