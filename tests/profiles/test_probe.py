"""Reading and measuring a machine."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.device import UNITS, DeviceProfile, Gpu, rows
from profiles.machine import RESERVE_LEAST, RESERVE_SHARE
from profiles.measure import WEIGHTS_MOST
from profiles.probe import _kind, probe, refresh
from tests.profiles.trees import MIB, machine, version_1, version_2, write


def bearable(bound: int) -> int:
    """What is left of a bound after the reserve."""
    return bound - max(int(bound * RESERVE_SHARE), RESERVE_LEAST)


def test_every_field_of_this_machine_has_a_reason_or_a_cause() -> None:
    profile = probe(measure=False)

    assert set(profile.reasons) | set(profile.unreadable) == set(UNITS)
    assert not set(profile.reasons) & set(profile.unreadable)
    assert 0 < profile.memory_bearable_bytes <= profile.memory_total_bytes
    assert len(rows(profile)) == len(UNITS)


def test_a_profile_survives_json() -> None:
    profile = replace(
        probe(measure=False),
        gpus=(Gpu("Orin", 8 * 2**30, 5 * 2**30, "8.7", unified=True),),
        gemm_shapes=((128, 576, 576), (1, 2, 3)),
        temperature_celsius=-3.5,
    )

    assert DeviceProfile.from_json(json.loads(json.dumps(profile.to_json()))) == profile


def test_an_empty_machine_is_described_by_what_could_not_be_read(tmp_path: Path) -> None:
    profile = probe(measure=False, root=tmp_path, disk=tmp_path / "nowhere")

    assert "disk_free_bytes" in profile.unreadable
    assert profile.disk_free_bytes == 0


def test_a_malformed_file_costs_its_fields_and_no_others(tmp_path: Path) -> None:
    root = machine(version_2(tmp_path, "/a"))
    write(root, {"sys/fs/cgroup/a/memory.max": "plenty"})

    profile = probe(measure=False, root=root, disk=tmp_path)

    assert {"memory_limit_bytes", "memory_bearable_bytes"} <= set(profile.unreadable)
    assert profile.memory_total_bytes == 4000 * MIB


# What the kernel may write where the probe reads, and what it never would.
FILES = (
    "proc/cpuinfo",
    "proc/meminfo",
    "proc/self/status",
    "proc/self/cgroup",
    "proc/self/mountinfo",
    "sys/fs/cgroup/a/memory.max",
    "sys/fs/cgroup/a/memory.current",
    "sys/fs/cgroup/a/memory.stat",
    "sys/fs/cgroup/a/cpu.max",
    "sys/fs/cgroup/memory/a/memory.limit_in_bytes",
    "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us",
    "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us",
    "proc/device-tree/model",
    "proc/device-tree/compatible",
    "etc/nv_tegra_release",
    "sys/devices/platform/soc/soc:firmware/get_throttled",
    "sys/class/thermal/thermal_zone0/temp",
    "sys/class/power_supply/BAT0/capacity",
)
NUMBERS = st.sampled_from(["0", "-1", "-5 kB", "0 0", "1e400", "nan", "inf", "0x", "9" * 5000, "kB", "", "max", "1 0"])
KEYS = st.sampled_from(
    ["MemTotal", "MemAvailable", "SwapTotal", "RssAnon", "flags", "core id", "CPU part", "CPU implementer"]
)
LINES = st.one_of(
    st.builds("{}: {}".format, KEYS, NUMBERS),
    NUMBERS,
    st.text(max_size=12),
    st.sampled_from(
        [
            "0::/a",
            "0::/../../..",
            "4:memory:/a",
            "2:cpu,cpuacct:/a",
            "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
            "31 23 0:28 /../x /../.. rw - cgroup2 cgroup2 rw",
            "31 23 0:28 / /\\000 rw - cgroup2 cgroup2 rw",
            "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
            "35 31 0:32 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct",
            "anon 1 2 3",
            "hierarchical_memory_limit -1",
            "nvidia,tegra234\0",
        ]
    ),
)
CONTENTS = st.one_of(st.lists(LINES, max_size=5).map(lambda lines: "\n".join(lines).encode()), st.binary(max_size=40))


@settings(max_examples=150, deadline=None)
@given(files=st.dictionaries(st.sampled_from(FILES), CONTENTS))
def test_whatever_the_kernel_writes_every_field_is_explained(
    files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No nonsense stops the probe or gets into the profile, which stays one that JSON can carry."""
    root = tmp_path_factory.mktemp("nonsense")
    write(root, {"sys/class/power_supply/BAT0/type": "Battery"})
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    profile = probe(measure=False, root=root, disk=root)

    assert set(profile.reasons) | set(profile.unreadable) == set(UNITS)
    assert not set(profile.reasons) & set(profile.unreadable)
    assert all({**profile.reasons, **profile.unreadable}.values())
    assert DeviceProfile.from_json(json.loads(json.dumps(profile.to_json()))) == profile
    assert len(rows(profile)) == len(UNITS)


def test_the_processor_is_read_from_proc(tmp_path: Path) -> None:
    profile = probe(measure=False, root=machine(tmp_path), disk=tmp_path)

    assert (profile.cpu_model, profile.physical_cores) == ("Test CPU", 2)
    assert profile.instruction_sets == ("avx2", "avx512f", "avx512_bf16")
    assert profile.bf16_is_fast
    assert profile.swap_bytes == 512 * MIB


def test_without_limits_what_is_available_and_already_ours_is_bearable(tmp_path: Path) -> None:
    root = machine(tmp_path, total_mib=4000, available_mib=3000, own_mib=100)

    profile = probe(measure=False, root=root, disk=tmp_path)

    assert profile.memory_limit_bytes is None
    assert profile.memory_bearable_bytes == bearable(3100 * MIB)


def test_what_this_process_already_uses_of_its_group_is_not_lost_for_training(tmp_path: Path) -> None:
    root = machine(version_2(tmp_path, "/client"), own_mib=300)
    write(
        root,
        {
            "sys/fs/cgroup/client/memory.max": str(900 * MIB),
            "sys/fs/cgroup/client/memory.current": str(500 * MIB),
            "sys/fs/cgroup/client/memory.stat": f"file {150 * MIB}\nshmem 0",
        },
    )

    profile = probe(measure=False, root=root, disk=tmp_path)

    # 500 used, 150 of it page cache, 300 of it ours: others hold 50.
    assert profile.memory_limit_bytes == 900 * MIB
    assert profile.memory_bearable_bytes == bearable(850 * MIB)


def test_a_wider_group_that_others_fill_can_bear_less_than_the_tightest_limit(tmp_path: Path) -> None:
    root = machine(version_1(tmp_path, "/slice/client"), own_mib=0)
    memory = "sys/fs/cgroup/memory/slice/"
    write(
        root,
        {
            memory + "memory.limit_in_bytes": str(2000 * MIB),
            memory + "memory.usage_in_bytes": str(1800 * MIB),
            memory + "client/memory.limit_in_bytes": str(900 * MIB),
            memory + "client/memory.usage_in_bytes": "0",
        },
    )

    profile = probe(measure=False, root=root, disk=tmp_path)

    assert profile.memory_limit_bytes == 900 * MIB
    assert profile.memory_bearable_bytes == bearable(200 * MIB)


@pytest.mark.parametrize(("declared", "expected"), [(600, 600), (1200, 900)])
def test_a_declared_limit_counts_unless_a_group_is_tighter(tmp_path: Path, declared: int, expected: int) -> None:
    root = machine(version_2(tmp_path, "/client"))
    write(root, {"sys/fs/cgroup/client/memory.max": str(900 * MIB)})

    profile = probe(memory_limit=declared * MIB, measure=False, root=root, disk=tmp_path)

    assert profile.memory_limit_bytes == expected * MIB
    assert profile.memory_bearable_bytes == bearable(expected * MIB)


def test_a_cpu_quota_limits_the_usable_cores(tmp_path: Path) -> None:
    root = machine(version_2(tmp_path, "/client"))
    write(root, {"sys/fs/cgroup/client/cpu.max": "50000 100000"})

    profile = probe(measure=False, root=root, disk=tmp_path)

    assert profile.usable_cores == 1
    assert "0.50 cores" in profile.reasons["usable_cores"]


def test_refreshing_reads_memory_again_and_keeps_what_was_measured(tmp_path: Path) -> None:
    before = replace(probe(measure=False, root=machine(tmp_path, available_mib=3000), disk=tmp_path), four_bit=False)

    after = refresh(before, root=machine(tmp_path, available_mib=1000), disk=tmp_path)

    assert after.memory_available_bytes == 1000 * MIB
    assert after.memory_bearable_bytes < before.memory_bearable_bytes
    assert after.four_bit is False
    assert after.cpu_model == before.cpu_model


def test_without_torch_the_profile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)

    profile = probe()

    assert "edge-runtime[client]" in profile.unreadable["four_bit"]
    assert "torch cannot be imported" in profile.unreadable["gemm_fp32_gflops"]
    assert profile.kind in ("cpu", "apple")


def test_what_the_machine_cannot_tell_says_who_could() -> None:
    profile = probe(measure=False)

    assert (profile.link_up_mbit_s, profile.link_latency_ms, profile.power_watts) == (0.0, 0.0, 0.0)
    assert "broker" in profile.unreadable["link_down_mbit_s"]
    assert "catalogue" in profile.unreadable["power_watts"]


def test_a_process_that_torch_would_get_killed_does_not_import_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    root = machine(version_2(tmp_path, "/client"), own_mib=20)
    write(root, {"sys/fs/cgroup/client/memory.max": str(200 * MIB)})

    profile = probe(root=root, disk=tmp_path)

    assert "torch" not in sys.modules
    assert "needs about 280 MiB, found 184 MiB" in profile.unreadable["gemm_fp32_gflops"]


def failing(*_: object, **__: object) -> Any:
    """As torch answers on a card that it was not built for."""
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device")


def test_a_card_whose_first_kernel_fails_is_not_trained_on() -> None:
    cuda = SimpleNamespace(is_available=lambda: True)

    found = _kind(SimpleNamespace(cuda=cuda, ones=failing, __version__="2.13.0"))

    assert found.value in ("cpu", "apple")
    assert "no kernel image" in found.reason


@pytest.fixture(scope="module")
def measured() -> DeviceProfile:
    """This machine, measured once."""
    pytest.importorskip("torch")
    return probe(shapes=((16, 64, 32), (16, 3000, 4000)))


@pytest.mark.torch
def test_what_only_a_run_can_tell_is_measured(measured: DeviceProfile) -> None:
    rates = ("gemm_fp32_gflops", "gemm_bf16_gflops", "memory_bandwidth_gb_s", "op_overhead_us", "int8_gweights_s")

    assert all(getattr(measured, rate) > 0 for rate in rates)
    assert all("measured" in measured.reasons[rate] for rate in rates)
    assert measured.bf16_rate_ratio == pytest.approx(measured.gemm_bf16_gflops / measured.gemm_fp32_gflops, rel=0.01)
    assert measured.bf16_is_fast == (measured.bf16_rate_ratio >= 0.9)


@pytest.mark.torch
def test_the_shapes_measured_are_named_and_bounded(measured: DeviceProfile) -> None:
    assert measured.gemm_shapes[0] == (16, 64, 32)
    assert math.prod(measured.gemm_shapes[1][1:]) <= WEIGHTS_MOST
    assert "cut down" in measured.reasons["gemm_fp32_gflops"]
    assert "16 x 64 x 32" in measured.reasons["gemm_bf16_gflops"]


@pytest.mark.torch
def test_an_8_bit_layer_trains_and_is_not_exact(measured: DeviceProfile) -> None:
    assert measured.eight_bit, measured.reasons["eight_bit"]
    cosines = [float(text.split()[0].rstrip(",")) for text in _cosines(measured.reasons["eight_bit"])]
    assert all(0.999 <= cosine < 0.999999 for cosine in cosines)


@pytest.mark.torch
def test_measuring_leaves_the_number_of_threads_alone() -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()

    probe()

    assert torch.get_num_threads() == before


@pytest.mark.torch
@pytest.mark.skipif(os.uname().machine not in ("x86_64", "aarch64"), reason="bitsandbytes has no wheel elsewhere")
def test_a_4_bit_layer_trains_and_is_not_exact(measured: DeviceProfile) -> None:
    pytest.importorskip("bitsandbytes")

    assert measured.four_bit, measured.reasons["four_bit"]
    assert measured.nf4_gweights_s > 0
    output, gradient = (float(text.split()[0].rstrip(",")) for text in _cosines(measured.reasons["four_bit"]))
    # Both are those of quantised weights: close to 1, and not 1 as they would be against themselves.
    assert 0.98 <= output < 0.9999
    assert 0.98 <= gradient < 0.9999


@pytest.mark.torch
def test_without_bitsandbytes_8_bit_layers_still_train(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)

    profile = probe(shapes=((4, 16, 16),))

    assert (profile.four_bit, profile.eight_bit) == (False, True)
    assert "pip install 'edge-runtime[client]'" in profile.reasons["four_bit"]
    assert "not installed" in profile.unreadable["nf4_gweights_s"]


def _cosines(reason: str) -> list[str]:
    return [reason.split("output ")[1], reason.split("gradient ")[1]]
