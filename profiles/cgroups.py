"""Which limits the kernel's control groups put on this process: memory and CPU, versions 1 and 2.

Limits are hierarchical: a group can never use more than any of its ancestors, so every level from the process's own
group up to the root of the mount is read, and the tightest one counts. Inside a container the path that
/proc/self/cgroup shows may start above what is mounted; /proc/self/mountinfo says where the mount's root is.

Source: Linux kernel documentation, admin-guide/cgroup-v1/memory.rst, admin-guide/cgroup-v2.rst and
scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# Version 1 writes LONG_MAX rounded down to a page for "no limit"; no machine has an exabyte of memory.
_NO_LIMIT = 2**60


@dataclass(frozen=True)
class CgroupMemory:
    """One level's limit and what counts against it.

    Attributes:
        limit: bytes that the processes of the group may use together.
        usage: bytes charged to it now that the kernel could not simply drop: page cache of files is left out, since
            it is given back under pressure; shared memory and tmpfs are not.
        path: the folder it was read from, with the file that held the limit.
    """

    limit: int
    usage: int
    path: str

    @property
    def room(self) -> int:
        """Bytes that may still be added before the limit bites."""
        return max(0, self.limit - self.usage)


@dataclass(frozen=True)
class CgroupCpu:
    """The tightest CPU quota.

    Attributes:
        cores: CPU seconds per second, such as 1.5.
        path: the folder it was read from.
    """

    cores: float
    path: str


@dataclass(frozen=True)
class _Group:
    """One folder on the way from the process's group (`own`) to the root of the mount."""

    folder: Path
    version: int
    own: bool


@dataclass(frozen=True)
class _MemoryFiles:
    """What one version calls its files, and the rows of memory.stat."""

    limits: tuple[str, ...]
    usage: str
    cache: str
    shared: str


# `memory.high` does not kill, but a process above it is slowed to a crawl: as good as a limit for training.
_MEMORY_FILES: Mapping[int, _MemoryFiles] = {
    1: _MemoryFiles(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_cache", "total_shmem"),
    2: _MemoryFiles(("memory.max", "memory.high"), "memory.current", "file", "shmem"),
}


def memory_limits(root: Path = Path("/")) -> tuple[CgroupMemory, ...]:
    """Every memory limit on this process, own group first; empty when there is none.

    Args:
        root: where /proc and /sys are found; a test gives a folder of its own.
    """
    found: list[CgroupMemory] = []
    for group in _groups(root, "memory"):
        # A version 1 parent without hierarchy does not account for its children.
        if group.own or group.version == 2 or _text(group.folder / "memory.use_hierarchy") != "0":
            found.extend(_memory_of(group))
    return tuple(found)


def memory_limit(root: Path = Path("/")) -> CgroupMemory | None:
    """The tightest memory limit on this process, or None when there is none.

    Args:
        root: where /proc and /sys are found; a test gives a folder of its own.
    """
    return min(memory_limits(root), key=lambda level: level.limit, default=None)


def cpu_quota(root: Path = Path("/")) -> CgroupCpu | None:
    """The tightest CPU quota on this process, or None when there is none.

    Args:
        root: where /proc and /sys are found; a test gives a folder of its own.
    """
    found: list[CgroupCpu] = []
    for group in _groups(root, "cpu"):
        if group.version == 2:
            quota, _, period = (_text(group.folder / "cpu.max") or "max").partition(" ")
        else:
            quota = _text(group.folder / "cpu.cfs_quota_us") or "-1"
            period = _text(group.folder / "cpu.cfs_period_us") or ""
        if quota not in ("max", "-1") and period not in ("", "0"):
            found.append(CgroupCpu(int(quota) / int(period), str(group.folder)))
    return min(found, key=lambda level: level.cores, default=None)


def _memory_of(group: _Group) -> Iterator[CgroupMemory]:
    stat = _table(group.folder / "memory.stat")
    names = _MEMORY_FILES[group.version]
    cache = max(0, stat.get(names.cache, 0) - stat.get(names.shared, 0))
    usage = max(0, _number(group.folder / names.usage) - cache)
    for name in names.limits:
        text = _text(group.folder / name)
        if text not in (None, "", "max") and int(text) < _NO_LIMIT:
            yield CgroupMemory(int(text), usage, str(group.folder / name))
    # Version 1 tells the tightest ancestor here too, even one above what a container has mounted.
    ancestors = stat.get("hierarchical_memory_limit", _NO_LIMIT)
    if ancestors < _NO_LIMIT:
        yield CgroupMemory(ancestors, usage, str(group.folder / "memory.stat"))


def _groups(root: Path, controller: str) -> Iterator[_Group]:
    """The folders that rule this process, own group first, of whichever version mounts the controller."""
    for version, path in _memberships(root, controller):
        for mount_root, mount_point in _mounts(root, controller, version):
            relative = _below(path, mount_root)
            top = root / mount_point.lstrip("/")
            own = top / relative
            for folder in (own, *own.parents):
                yield _Group(folder, version, folder == own)
                if folder == top:
                    break


def _memberships(root: Path, controller: str) -> Iterator[tuple[int, str]]:
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            yield 2, path
        elif controller in controllers.split(","):
            yield 1, path


def _mounts(root: Path, controller: str, version: int) -> Iterator[tuple[str, str]]:
    """(root of the mount inside its hierarchy, mount point) of each mounted hierarchy that has the controller."""
    for line in (_text(root / "proc/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        before, after = left.split(), right.split()
        if len(before) < 5 or len(after) < 3:
            continue
        wanted = after[0] == "cgroup2" if version == 2 else after[0] == "cgroup" and controller in after[2].split(",")
        if wanted:
            yield _unescaped(before[3]), _unescaped(before[4])


def _below(path: str, mount_root: str) -> str:
    """Where `path` lies under a mount whose own root is `mount_root`; the mount itself when it lies outside."""
    candidate, top = PurePosixPath(path), PurePosixPath(mount_root)
    if ".." in candidate.parts or not candidate.is_relative_to(top):
        return ""
    return str(candidate.relative_to(top))


def _unescaped(text: str) -> str:
    """Mountinfo writes a space, tab, newline or backslash as a backslash and three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)


def _text(path: Path) -> str | None:
    """The file's text without its end of line; None when there is none: not every level has each file."""
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _number(path: Path) -> int:
    return int(_text(path) or 0)


def _table(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in (_text(path) or "").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
