"""Jetson, Raspberry Pi, and machines that are no board."""

from __future__ import annotations

from pathlib import Path

import pytest

from profiles import boards
from profiles.machine import Machine
from profiles.probe import probe
from tests.profiles.trees import machine, write

RELEASE = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025"
JETSON = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234\0",
    "etc/nv_tegra_release": RELEASE,
}
PI = {
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0",
}
THROTTLED = "sys/devices/platform/soc/soc:firmware/get_throttled"
ARM = "processor : 0\nFeatures : fp asimd asimddp bf16 i8mm sve\nCPU implementer : 0x41\nCPU part : 0xd42\n"


def test_a_jetson_is_known_by_its_device_tree(tmp_path: Path) -> None:
    profile = probe(measure=False, root=write(machine(tmp_path), JETSON), disk=tmp_path)

    assert profile.board == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit"
    assert profile.l4t == "36.4.3"
    assert "tegra234 (Jetson Orin)" in profile.reasons["board"]
    assert "counted once" in profile.reasons["board"]


def test_a_jetson_in_a_container_says_which_file_is_missing(tmp_path: Path) -> None:
    files = {name: text for name, text in JETSON.items() if not name.startswith("etc")}

    profile = probe(measure=False, root=write(machine(tmp_path), files), disk=tmp_path)

    assert profile.l4t == ""
    assert "mount" in profile.unreadable["l4t"]
    assert boards.is_jetson(Machine(tmp_path))


@pytest.mark.parametrize("text", ["", "R36", "# R (release), REVISION: x", "\0\0"])
def test_a_release_that_is_none_costs_its_field_alone(tmp_path: Path, text: str) -> None:
    root = write(machine(tmp_path), {**JETSON, "etc/nv_tegra_release": text})

    profile = probe(measure=False, root=root, disk=tmp_path)

    assert "nv_tegra_release" in profile.unreadable["l4t"]
    assert profile.board.startswith("NVIDIA Jetson")


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ("0", "not held back now"),
        ("50005", "held back now: under-voltage, throttled"),
        ("80000", "not held back now; since its start: at the soft limit of temperature"),
        ("20006", "held back now: its clock is capped, throttled"),
    ],
)
def test_a_raspberry_pi_says_whether_it_is_held_back(tmp_path: Path, bits: str, expected: str) -> None:
    found = boards.board(Machine(write(tmp_path, {**PI, THROTTLED: bits})))

    assert found.value == "Raspberry Pi 5 Model B Rev 1.0"
    assert found.reason.endswith(expected)
    assert "BCM2712 (Raspberry Pi 5)" in found.reason


def test_a_board_without_a_model_is_called_by_its_chip(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/device-tree/compatible": "somebody,board\0nvidia,tegra194\0"})

    assert boards.board(Machine(root)).value == "tegra194 (Jetson Xavier)"


def test_a_machine_without_a_device_tree_is_no_board(tmp_path: Path) -> None:
    profile = probe(measure=False, root=machine(tmp_path), disk=tmp_path)

    assert (profile.board, profile.l4t) == ("", "")
    assert "not a Jetson" in profile.reasons["l4t"]


def test_an_arm_processor_is_named_by_its_cores(tmp_path: Path) -> None:
    little = ARM.replace("0xd42", "0xd05").replace("processor : 0", "processor : 1")
    root = write(machine(tmp_path), {"proc/cpuinfo": f"{ARM}\n{little}\n{ARM}\n{ARM.replace('0xd42', '0xfff')}"})

    profile = probe(measure=False, root=root, disk=tmp_path)

    assert profile.cpu_model == "Cortex-A78AE + Cortex-A55 + ARM core 0xfff of implementer 0x41"
    assert profile.instruction_sets == ("neon", "dotprod", "bf16", "i8mm", "sve")
    assert profile.bf16_is_fast
