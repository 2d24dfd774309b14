"""The devices that ship with the package."""

from __future__ import annotations

import json

import pytest

from edge_runtime.errors import ConfigError
from profiles.catalogue import device, known_devices
from profiles.device import DeviceProfile

EXPECTED = {"raspberry-pi-4", "raspberry-pi-5", "jetson-nano", "jetson-orin-nano", "laptop-x86", "desktop-gpu"}


def test_the_catalogue_holds_the_devices_that_people_have() -> None:
    assert set(known_devices()) >= EXPECTED


@pytest.mark.parametrize("name", known_devices())
def test_every_device_loads_and_survives_json(name: str) -> None:
    profile = device(name)

    assert profile.name == name
    assert DeviceProfile.from_json(json.loads(json.dumps(profile.to_json()))) == profile


@pytest.mark.parametrize("name", known_devices())
def test_figures_are_consistent(name: str) -> None:
    profile = device(name)

    assert profile.memory_available_bytes <= profile.memory_total_bytes
    assert profile.gemm_fp32_gflops > 0
    assert ("gemm_bf16_gflops" in profile.unreadable) == (profile.gemm_bf16_gflops == 0)
    assert all(gpu.free_bytes <= gpu.total_bytes for gpu in profile.gpus)
    assert (profile.kind == "cuda") == bool(profile.gpus)


def test_a_card_with_memory_of_its_own_bears_what_is_free_on_it() -> None:
    profile = device("desktop-gpu")

    assert profile.memory_bearable_bytes < profile.gpus[0].free_bytes < profile.memory_available_bytes


def test_an_unknown_device_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown device 'toaster'; .*desktop-gpu.*raspberry-pi-5"):
        device("toaster")
