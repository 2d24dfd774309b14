"""Reading and measuring a machine."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from profiles.device import UNITS, DeviceProfile, Gpu, rows
from profiles.machine import RESERVE_LEAST, RESERVE_SHARE
from profiles.probe import probe, refresh
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
    profile = replace(probe(measure=False), gpus=(Gpu("Orin", 8 * 2**30, 5 * 2**30, "8.7", unified=True),))

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


@pytest.mark.torch
def test_what_only_a_run_can_tell_is_measured() -> None:
    pytest.importorskip("torch")

    profile = probe()

    assert profile.gemm_fp32_gflops > 0
    assert profile.bf16_rate_ratio == pytest.approx(profile.gemm_bf16_gflops / profile.gemm_fp32_gflops, rel=0.2)
    assert profile.bf16_is_fast == (profile.bf16_rate_ratio >= 0.9)
    assert "measured" in profile.reasons["bf16_is_fast"]


@pytest.mark.torch
def test_measuring_leaves_the_number_of_threads_alone() -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()

    probe()

    assert torch.get_num_threads() == before


@pytest.mark.torch
@pytest.mark.skipif(os.uname().machine not in ("x86_64", "aarch64"), reason="bitsandbytes has no wheel elsewhere")
def test_a_4_bit_layer_trains_and_is_not_exact() -> None:
    pytest.importorskip("bitsandbytes")

    profile = probe()

    assert profile.four_bit, profile.reasons["four_bit"]
    output, gradient = (float(text.split()[0].rstrip(",")) for text in _cosines(profile.reasons["four_bit"]))
    # Both are those of quantised weights: close to 1, and not 1 as they would be against themselves.
    assert 0.98 <= output < 0.9999
    assert 0.98 <= gradient < 0.9999


def _cosines(reason: str) -> list[str]:
    return [reason.split("output ")[1], reason.split("gradient ")[1]]
