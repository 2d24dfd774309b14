"""Builds small /proc and /sys trees, as the kernel would show them to one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

MIB = 2**20


def write(root: Path, files: Mapping[str, str]) -> Path:
    """Writes each file below `root` and returns `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return root


def version_2(root: Path, path: str, mount_root: str = "/") -> Path:
    """A machine with the unified hierarchy, the process in group `path`."""
    mount = f"31 23 0:28 {mount_root} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw"
    return write(root, {"proc/self/cgroup": f"0::{path}", "proc/self/mountinfo": mount})


def version_1(root: Path, path: str, mount_root: str = "/") -> Path:
    """A machine with memory and cpu controllers of version 1 beside an empty unified hierarchy, as systemd's hybrid."""
    mounts = (
        f"35 31 0:32 {mount_root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory",
        f"32 31 0:29 {mount_root} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct",
        "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw",
    )
    groups = f"4:memory:{path}\n2:cpu,cpuacct:{path}\n0::/"
    return write(root, {"proc/self/cgroup": groups, "proc/self/mountinfo": "\n".join(mounts)})


def machine(root: Path, total_mib: int = 4000, available_mib: int = 3000, own_mib: int = 100) -> Path:
    """Adds memory and processor of a small machine with two cores of two hardware threads each."""
    meminfo = f"MemTotal: {total_mib * 1024} kB\nMemAvailable: {available_mib * 1024} kB\nSwapTotal: {512 * 1024} kB"
    cpus = "\n\n".join(
        f"processor : {index}\nmodel name : Test CPU\nphysical id : 0\ncore id : {index % 2}\n"
        "flags : fpu avx2 avx512f avx512_bf16 nonsense"
        for index in range(4)
    )
    status = f"VmRSS: {2 * own_mib * 1024} kB\nRssAnon: {own_mib * 1024} kB"
    return write(root, {"proc/meminfo": meminfo, "proc/cpuinfo": cpus, "proc/self/status": status})
