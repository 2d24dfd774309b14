"""What the operating system says about this machine: processor, memory, disk. No torch, nothing measured.

Each reader takes a `Machine` (where to look) and gives a `Reading`: a value and the sentence that explains it. A reader
that cannot read raises; `profiles.probe` writes the cause into the profile and goes on.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from edge_runtime.errors import ConfigError
from profiles import cgroups
from profiles.device import MIB


@dataclass(frozen=True)
class Machine:
    """Where to look.

    Attributes:
        root: the folder that holds /proc and /sys; a test gives one of its own.
        disk: a folder on the disk that models and updates are kept on.
        declared_limit: bytes that somebody said this process may use, None when nobody did.
    """

    root: Path = Path("/")
    disk: Path = Path()
    declared_limit: int | None = None


@dataclass(frozen=True)
class Reading:
    """A value and the sentence that says where it comes from."""

    value: Any
    reason: str


# What reading may raise: files that are missing or malformed, libraries that are absent or cannot load, and kernels
# that are not built for this device (RuntimeError, and AttributeError when a native library is not there), or whose
# library has changed how it is called (TypeError).
FAILURES = (
    psutil.Error,
    TypeError,
    OSError,
    ValueError,
    LookupError,
    ArithmeticError,
    ImportError,
    AttributeError,
    RuntimeError,
    MemoryError,
    subprocess.SubprocessError,
    ConfigError,
)

# What is left alone of the bearable memory: kernel memory charged to us, and other programs that grow meanwhile.
RESERVE_SHARE = 0.03
RESERVE_LEAST = 16 * MIB
RESERVE_MOST = 512 * MIB

# The names of /proc/cpuinfo ("flags" on x86, "Features" on ARM) that change how fast training runs, and our names.
INSTRUCTION_SETS: Mapping[str, str] = {
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx512_bf16": "avx512_bf16",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
    "neon": "neon",
    "asimd": "neon",
    "asimddp": "dotprod",
    "bf16": "bf16",
    "i8mm": "i8mm",
    "sve": "sve",
    "sve2": "sve2",
}

# The same as sysctl answers on Apple's processors ("hw.optional.arm.FEAT_…").
APPLE_SETS: Mapping[str, str] = {"FEAT_DotProd": "dotprod", "FEAT_BF16": "bf16", "FEAT_I8MM": "i8mm"}

# "CPU part" of /proc/cpuinfo on ARM, which names no model: (implementer, part) → core.
# Source: the MIDR_EL1 values of Linux, arch/arm64/include/asm/cputype.h, and of util-linux, sys-utils/lscpu-arm.c.
ARM_CORES: Mapping[tuple[int, int], str] = {
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD09): "Cortex-A73",
    (0x41, 0xD0A): "Cortex-A75",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD0D): "Cortex-A77",
    (0x41, 0xD0E): "Cortex-A76AE",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD44): "Cortex-X1",
    (0x41, 0xD47): "Cortex-A710",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4B): "Cortex-A78C",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD80): "Cortex-A520",
    (0x41, 0xD81): "Cortex-A720",
    (0x41, 0xD83): "Neoverse-V3AE",
    (0x41, 0xD84): "Neoverse-V3",
    (0x4E, 0x003): "NVIDIA Denver 2",
    (0x4E, 0x004): "NVIDIA Carmel",
}


def name(_: Machine) -> Reading:
    """The host name."""
    return Reading(platform.node() or "unnamed", "the host name")


def cpu_model(machine: Machine) -> Reading:
    """The processor's model, or its cores where the kernel tells no model, as on ARM."""
    implementer, cores = 0, dict[str, None]()
    for key, value in _cpuinfo_pairs(machine):
        if key == "model name":
            return Reading(value, "from /proc/cpuinfo")
        if key == "CPU implementer":
            implementer = int(value, 0)
        elif key == "CPU part":
            part = int(value, 0)
            cores[ARM_CORES.get((implementer, part), f"ARM core {part:#x} of implementer {implementer:#x}")] = None
    if cores:
        return Reading(" + ".join(cores), "implementer and part in /proc/cpuinfo")
    if platform.system() == "Darwin" and machine.root == Path("/"):
        return Reading(sysctl("machdep.cpu.brand_string"), "sysctl machdep.cpu.brand_string")
    found = platform.processor() or platform.machine()
    if not found:
        raise OSError("neither /proc nor the platform tells the processor's model")
    return Reading(found, "from the platform; /proc/cpuinfo does not tell")


def architecture(_: Machine) -> Reading:
    """The instruction set family."""
    return Reading(platform.machine(), "of the running kernel")


def physical_cores(machine: Machine) -> Reading:
    """Cores without their hardware threads."""
    cores: set[tuple[str, str]] = set()
    package = ""
    for key, value in _cpuinfo_pairs(machine):
        if key == "physical id":
            package = value
        elif key == "core id":
            cores.add((package, value))
    if cores:
        return Reading(len(cores), "distinct (package, core) pairs in /proc/cpuinfo")
    found = psutil.cpu_count(logical=False)
    if found is None:
        return Reading(os.cpu_count() or 1, "logical processors; the system does not tell cores from hardware threads")
    return Reading(found, "as the system counts them")


def usable_cores(machine: Machine) -> Reading:
    """Cores that affinity and CPU quota leave to this process."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroups.cpu_quota(machine.root)
    if quota is not None and quota.cores < allowed:
        # Rounded down: threads above the quota are put to sleep in turn, and the others wait for them.
        return Reading(max(1, math.floor(quota.cores)), f"a quota of {quota.cores:.2f} cores in {quota.path}")
    return Reading(allowed, "processors that this process may run on (affinity); no tighter quota")


def instruction_sets(machine: Machine) -> Reading:
    """Those that change how fast training runs, sorted by the order of the table."""
    for key, value in _cpuinfo_pairs(machine):
        if key in ("flags", "Features"):
            present = set(value.split())
            found = dict.fromkeys(ours for theirs, ours in INSTRUCTION_SETS.items() if theirs in present)
            return Reading(tuple(found), f"'{key}' in /proc/cpuinfo")
    if platform.machine() == "arm64" and machine.root == Path("/"):
        more = [ours for theirs, ours in APPLE_SETS.items() if sysctl(f"hw.optional.arm.{theirs}") == "1"]
        return Reading(("neon", *more), "every 64-bit ARM processor has neon; sysctl hw.optional.arm tells the others")
    raise OSError("/proc/cpuinfo has neither 'flags' nor 'Features'")


def memory_total(machine: Machine) -> Reading:
    """RAM, in bytes."""
    return _meminfo(machine, "MemTotal", "total")


def memory_available(machine: Machine) -> Reading:
    """RAM that could be handed out now without swapping, in bytes."""
    return _meminfo(machine, "MemAvailable", "available")


def swap(machine: Machine) -> Reading:
    """Swap space, in bytes."""
    table = _meminfo_table(machine)
    size = table["SwapTotal"] if "SwapTotal" in table else int(psutil.swap_memory().total)
    return Reading(size, "not counted as bearable: training that swaps is 10 times slower or worse")


def memory_limit(machine: Machine) -> Reading:
    """The tightest limit on this process, in bytes; None when there is none."""
    group = cgroups.memory_limit(machine.root)
    declared = machine.declared_limit
    if declared is not None and (group is None or declared <= group.limit):
        return Reading(declared, "declared by whoever started this process")
    if group is not None:
        return Reading(group.limit, f"the tightest control group on the way up: {group.path}")
    return Reading(None, "no control group limits this process, and nobody declared a limit")


def memory_bearable(machine: Machine) -> Reading:
    """What the training process may use at its peak, in bytes.

    The process that probes is the one that will train (or it ends before), so what it already uses counts as free:
    min(available + own anonymous memory, limit - what others in the group use, declared limit) - a reserve.
    """
    own = _own(machine)
    bounds = [
        (level.limit - max(0, level.usage - own), f"the limit in {level.path} less what others in it use")
        for level in cgroups.memory_limits(machine.root)
    ]
    if machine.declared_limit is not None:
        bounds.append((machine.declared_limit, "the declared limit"))
    available = memory_available(machine).value + own
    bounds.append(
        (min(available, memory_total(machine).value), "what is available, and what this process already uses")
    )
    return with_reserve(*min(bounds))


def with_reserve(bound: int, source: str) -> Reading:
    """What may be used of `bound` bytes."""
    reserve = min(max(int(bound * RESERVE_SHARE), RESERVE_LEAST), RESERVE_MOST)
    return Reading(max(0, bound - reserve), f"{source}, less a reserve of {reserve / MIB:.0f} MiB")


def disk_free(machine: Machine) -> Reading:
    """Free bytes on the disk of `machine.disk`."""
    return Reading(shutil.disk_usage(machine.disk).free, f"free on the disk of {machine.disk.resolve()}")


READERS: Mapping[str, Callable[[Machine], Reading]] = {
    "name": name,
    "cpu_model": cpu_model,
    "architecture": architecture,
    "physical_cores": physical_cores,
    "usable_cores": usable_cores,
    "instruction_sets": instruction_sets,
    "memory_total_bytes": memory_total,
    "memory_available_bytes": memory_available,
    "memory_limit_bytes": memory_limit,
    "memory_bearable_bytes": memory_bearable,
    "swap_bytes": swap,
    "disk_free_bytes": disk_free,
}


def sentence(error: BaseException) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def sysctl(key: str) -> str:
    """One value of macOS's kernel.

    Raises:
        OSError: there is no such value, or no sysctl.
        subprocess.SubprocessError: sysctl did not answer.
    """
    done = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, timeout=5, check=False)
    if done.returncode != 0 or not done.stdout.strip():
        raise OSError(f"sysctl {key} gave nothing: {done.stderr.strip() or 'no value'}")
    return done.stdout.strip()


def _cpuinfo_pairs(machine: Machine) -> Iterator[tuple[str, str]]:
    path = machine.root / "proc/cpuinfo"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        key, _, value = line.partition(":")
        yield key.strip(), value.strip()


def _meminfo_table(machine: Machine) -> dict[str, int]:
    path = machine.root / "proc/meminfo"
    if not path.is_file():
        return {}
    pairs = (line.partition(":")[::2] for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return {key: int(value.split()[0]) * 1024 for key, value in pairs if value.split()}


def _meminfo(machine: Machine, key: str, attribute: str) -> Reading:
    table = _meminfo_table(machine)
    if key in table:
        return Reading(table[key], f"{key} in /proc/meminfo")
    return Reading(int(getattr(psutil.virtual_memory(), attribute)), "as the system reports it")


def _own(machine: Machine) -> int:
    """Anonymous bytes of this process; its file-backed pages already count as available."""
    path = machine.root / "proc/self/status"
    if not path.is_file():
        return int(psutil.Process().memory_info().rss)
    pairs = (line.partition(":")[::2] for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    table = {key: int(value.split()[0]) * 1024 for key, value in pairs if value.strip().endswith("kB")}
    return table.get("RssAnon", table.get("VmRSS", 0))
