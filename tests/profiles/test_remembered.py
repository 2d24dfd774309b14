"""A profile that was measured before is not measured again until something changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from profiles import probe as probing
from profiles import remembered
from profiles.device import DeviceProfile
from profiles.kernels import UNMEASURED
from profiles.machine import Reading
from profiles.remembered import remembered_probe
from tests.profiles.trees import MIB, machine, write

ROOT = Path(__file__).parents[2]


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Reading | str]]:
    """Counts the measurements, each giving a higher rate than the one before, and spares running torch."""
    done: list[dict[str, Reading | str]] = []

    def measured(here: Any, readings: Any, shapes: Any) -> dict[str, Reading | str]:
        facts: dict[str, Reading | str] = dict.fromkeys(probing.MEASURED, "not tried")
        facts |= {
            "kind": Reading("cpu", "torch trains on cpu"),
            "gemm_fp32_gflops": Reading(float(len(done) + 1), "measured"),
            "gemm_shapes": Reading(tuple(shapes), "measured"),
            "four_bit": Reading(True, "quantised"),
        }
        done.append(facts)
        return facts

    monkeypatch.setattr(probing, "measured", measured)
    return done


def recall(folder: Path, **changes: Any) -> DeviceProfile:
    """The profile of the machine that the folder holds."""
    return remembered_probe(folder / "cache", root=folder / "root", disk=folder, **changes)


def files(folder: Path) -> list[Path]:
    """What the cache holds, its unfinished files included."""
    return sorted((folder / "cache").iterdir())


def test_the_second_time_is_remembered_and_says_so(tmp_path: Path, measurements: list[Any]) -> None:
    machine(tmp_path / "root")

    first, second, third = recall(tmp_path), recall(tmp_path), recall(tmp_path)

    assert len(measurements) == 1
    assert all(getattr(second, field) == getattr(first, field) for field in probing.MEASURED)
    assert second.reasons["gemm_fp32_gflops"] == "remembered: measured"
    assert second.unreadable == first.unreadable
    assert third.reasons == second.reasons
    assert len(files(tmp_path)) == 1


def test_what_changes_is_read_each_time(tmp_path: Path, measurements: list[Any]) -> None:
    machine(tmp_path / "root", available_mib=3000)
    before = recall(tmp_path)
    machine(tmp_path / "root", available_mib=1000)
    write(tmp_path / "root", {"sys/class/thermal/thermal_zone0/temp": "70000"})

    after = recall(tmp_path, memory_limit=500 * MIB)

    assert len(measurements) == 1
    assert (before.memory_available_bytes, after.memory_available_bytes) == (3000 * MIB, 1000 * MIB)
    assert after.memory_limit_bytes == 500 * MIB
    assert after.temperature_celsius == 70.0


def test_refresh_measures_and_remembers_that(tmp_path: Path, measurements: list[Any]) -> None:
    machine(tmp_path / "root")
    recall(tmp_path)

    assert recall(tmp_path, refresh=True).gemm_fp32_gflops == 2
    assert recall(tmp_path).gemm_fp32_gflops == 2
    assert len(files(tmp_path)) == 1


def test_other_hardware_libraries_or_shapes_are_measured(
    tmp_path: Path, measurements: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path / "root")
    recall(tmp_path)

    recall(tmp_path, shapes=((1, 2, 3),))
    assert len(measurements) == 2
    write(tmp_path / "root", {"proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: NVIDIA H200"})
    recall(tmp_path)
    assert len(measurements) == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    recall(tmp_path)
    assert len(measurements) == 4
    monkeypatch.setattr(remembered, "_version", lambda *_: "2.99")
    recall(tmp_path)
    assert len(measurements) == 5
    machine(tmp_path / "root", total_mib=8000)
    recall(tmp_path)
    assert len(measurements) == 6
    assert len(files(tmp_path)) == 6


def broken(text: str) -> dict[str, bytes]:
    """Ways in which a file may be wrong, by name."""
    data = json.loads(text)
    profile = data["profile"]
    return {
        "empty": b"",
        "cut off": text[: len(text) // 2].encode(),
        "no text": b"\xff\xfe\x00",
        "no object": b"[1, 2]",
        "deep": b"[" * 100_000,
        "large": b" " * (remembered.LARGEST_FILE + 1),
        "another key": json.dumps({**data, "key": {}}).encode(),
        "another form": json.dumps({"key": data["key"]}).encode(),
        "no profile": json.dumps({**data, "profile": None}).encode(),
        "a missing field": json.dumps({**data, "profile": {k: v for k, v in profile.items() if k != "l4t"}}).encode(),
        "a negative field": json.dumps({**data, "profile": {**profile, "gemm_fp32_gflops": -1.0}}).encode(),
        "a wrong list": json.dumps({**data, "profile": {**profile, "gpus": [3]}}).encode(),
        "an unknown kind": json.dumps({**data, "profile": {**profile, "kind": "tpu"}}).encode(),
        "no reasons": json.dumps({**data, "profile": {**profile, "reasons": {}}}).encode(),
        "reasons of another type": json.dumps({**data, "profile": {**profile, "reasons": ["x"]}}).encode(),
    }


WAYS = tuple(broken('{"key": {}, "profile": {}}'))


@pytest.mark.parametrize("way", WAYS)
def test_a_file_of_no_use_is_measured_anew(tmp_path: Path, measurements: list[Any], way: str) -> None:
    machine(tmp_path / "root")
    recall(tmp_path)
    (file,) = files(tmp_path)
    file.write_bytes(broken(file.read_text(encoding="utf-8"))[way])
    said: list[str] = []

    found = recall(tmp_path, say=said.append)

    assert found.gemm_fp32_gflops == 2
    assert len(said) == 1
    assert "measured anew" in said[0]
    assert "\n" not in said[0]
    assert recall(tmp_path).gemm_fp32_gflops == 2


def test_a_folder_that_cannot_be_written_is_said_and_stops_nothing(tmp_path: Path, measurements: list[Any]) -> None:
    machine(tmp_path / "root")
    (tmp_path / "cache").write_text("a file where the folder would be")
    said: list[str] = []

    assert recall(tmp_path, say=said.append).gemm_fp32_gflops == 1
    assert "cannot be remembered" in said[-1]


@pytest.mark.parametrize(
    "fault", [{"gemm_fp32_gflops": "torch cannot be imported"}, {"four_bit": f"{UNMEASURED}: it did not end in time"}]
)
def test_what_failed_is_tried_again(
    tmp_path: Path, measurements: list[Any], monkeypatch: pytest.MonkeyPatch, fault: dict[str, str]
) -> None:
    machine(tmp_path / "root")
    whole = probing.measured
    monkeypatch.setattr(probing, "measured", lambda *arguments: {**whole(*arguments), **fault})

    recall(tmp_path)
    recall(tmp_path)

    assert len(measurements) == 2


@pytest.mark.torch
def test_a_remembered_profile_is_had_without_torch(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    code = (
        "import sys, json; from pathlib import Path; from profiles.remembered import remembered_probe\n"
        "found = remembered_probe(Path(sys.argv[1]), shapes=((4, 32, 32),))\n"
        "print(json.dumps(['torch' in sys.modules, 'bitsandbytes' in sys.modules, found.gemm_fp32_gflops]))"
    )

    def started() -> Any:
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        return json.loads(done.stdout.splitlines()[-1])

    first, second = started(), started()

    assert first[0] is True
    assert second == [False, False, first[2]]
