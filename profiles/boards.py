"""Which board this is: Jetson, Raspberry Pi or Apple; what only such boards tell, and whether they are held back.

Source: Devicetree Specification 0.4 §2.3 (`model` and `compatible`, texts that end in NUL); NVIDIA, Jetson Linux
Developer Guide (/etc/nv_tegra_release); Raspberry Pi documentation, "vcgencmd get_throttled" (the bits).
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path

from profiles.machine import Machine, Reading, sysctl

# What the device tree's `compatible` calls a chip, and what people call it. All but the first five are Jetsons.
CHIPS: Mapping[str, str] = {
    "brcm,bcm2712": "BCM2712 (Raspberry Pi 5)",
    "brcm,bcm2711": "BCM2711 (Raspberry Pi 4)",
    "brcm,bcm2837": "BCM2837 (Raspberry Pi 3)",
    "brcm,bcm2836": "BCM2836 (Raspberry Pi 2)",
    "brcm,bcm2835": "BCM2835 (Raspberry Pi 1)",
    "nvidia,tegra264": "tegra264 (Jetson Thor)",
    "nvidia,tegra234": "tegra234 (Jetson Orin)",
    "nvidia,tegra194": "tegra194 (Jetson Xavier)",
    "nvidia,tegra186": "tegra186 (Jetson TX2)",
    "nvidia,tegra210": "tegra210 (Jetson Nano, TX1)",
}
JETSON = "nvidia,tegra"

# Bits of get_throttled that hold now; the same bits 16 higher say that it happened since the start.
THROTTLED: Mapping[int, str] = {
    0: "under-voltage",
    1: "its clock is capped",
    2: "throttled",
    3: "at the soft limit of temperature",
}
_THROTTLED_FILE = "sys/devices/platform/soc/soc:firmware/get_throttled"
_RELEASE = re.compile(r"#?\s*R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)")


def board(machine: Machine) -> Reading:
    """The board's name; empty for a machine that is none."""
    model = _texts(machine, "model")
    chips = compatible(machine)
    chip = next((CHIPS[name] for name in chips if name in CHIPS), "")
    if not model and not chip:
        return _apple(machine) or Reading("", "no device tree in /proc, so no board that names itself")
    source = "the model in /proc/device-tree" if model else "the chip in /proc/device-tree, which names no model"
    shared = "its GPU uses the CPU's memory, counted once" if is_jetson(machine) else ""
    facts = (source, f"chip {chip}" if chip and model else "", shared, throttling(machine))
    return Reading(model[0] if model else chip, "; ".join(fact for fact in facts if fact))


def l4t(machine: Machine) -> Reading:
    """The release of L4T, such as "36.4.3"; empty on what is no Jetson."""
    path = machine.root / "etc/nv_tegra_release"
    if not path.is_file():
        if is_jetson(machine):
            raise OSError("a Jetson without /etc/nv_tegra_release, as in a container; mount that file into it")
        return Reading("", "not a Jetson")
    found = _RELEASE.match(_read(path))
    if found is None:
        raise ValueError("/etc/nv_tegra_release does not begin with '# R<number> (release), REVISION: <number>'")
    return Reading(f"{found.group(1)}.{found.group(2)}", "from /etc/nv_tegra_release")


def is_jetson(machine: Machine) -> bool:
    """Whether the GPU, if there is one, shares the memory of the CPU."""
    tegra = any(name.startswith(JETSON) for name in compatible(machine))
    return tegra or (machine.root / "etc/nv_tegra_release").is_file()


def compatible(machine: Machine) -> tuple[str, ...]:
    """Board and chip as the device tree names them, the most exact first; empty where there is no device tree."""
    return _texts(machine, "compatible")


def throttling(machine: Machine) -> str:
    """A sentence on whether a Raspberry Pi is held back now or was since its start; empty where nobody tells."""
    path = machine.root / _THROTTLED_FILE
    if not path.is_file():
        return ""
    bits = int(_read(path), 16)
    now = [name for bit, name in THROTTLED.items() if bits >> bit & 1]
    before = [name for bit, name in THROTTLED.items() if bits >> (bit + 16) & 1 and name not in now]
    parts = (
        f"held back now: {', '.join(now)}" if now else "not held back now",
        f"since its start: {', '.join(before)}" if before else "",
    )
    return "; ".join(part for part in parts if part)


def _texts(machine: Machine, name: str) -> tuple[str, ...]:
    """The NUL-separated texts of one property at the root of the device tree."""
    path = machine.root / "proc/device-tree" / name
    return tuple(text.strip() for text in _read(path).split("\0") if text.strip()) if path.is_file() else ()


def _apple(machine: Machine) -> Reading | None:
    if platform.system() != "Darwin" or machine.root != Path("/"):
        return None
    return Reading(sysctl("hw.model"), "sysctl hw.model")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip()
