"""What the machine says of itself, read from folders that look like /proc, /sys and /dev, and from the real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from edge_runtime import sensors
from edge_runtime.demo.limits import impose
from edge_runtime.survival import Kernel, Mark, verdict

MIB = 1 << 20


def written(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")
    return root


def machine(root: Path, **changes: str) -> Path:
    """A machine with version 2 control groups, this process in /service."""
    group = "sys/fs/cgroup/service"
    return written(
        root,
        {
            "proc/sys/kernel/random/boot_id": "one\n",
            "proc/vmstat": "nr_free_pages 5\noom_kill 4\n",
            "proc/self/cgroup": "0::/service\n",
            "proc/self/mountinfo": "1 0 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            f"{group}/memory.max": f"{64 * MIB}\n",
            f"{group}/memory.current": "1\n",
            f"{group}/memory.events": "low 0\nhigh 0\nmax 9\noom 2\noom_kill 1\n",
            **changes,
        },
    )


def test_the_kernel_is_asked_for_boot_machine_and_own_group(tmp_path: Path) -> None:
    found = sensors.kernel(machine(tmp_path))
    folder = tmp_path / "sys/fs/cgroup/service"

    assert found == Kernel("one", 4, 1, f"{folder}#{folder.stat().st_ino}")


def test_counters_that_are_missing_are_none(tmp_path: Path) -> None:
    assert sensors.kernel(tmp_path) == Kernel()
    assert sensors.kernel(machine(tmp_path, **{"proc/vmstat": "nr_free_pages 5\n"})).machine_kills is None


def test_version_1_counts_in_the_own_group_alone(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/service"
    files = {
        "proc/self/cgroup": "4:memory:/service\n",
        "proc/self/mountinfo": "1 0 0:1 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
        f"{group}/memory.limit_in_bytes": f"{64 * MIB}\n",
        f"{group}/memory.usage_in_bytes": "1\n",
        f"{group}/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        f"{group}/cgroup.procs": "1\n",
    }
    assert sensors.kernel(written(tmp_path, files)).group_kills is None, "a group of others acquits nobody"
    files[f"{group}/cgroup.procs"] = f"1\n{os.getpid()}\n"
    assert sensors.kernel(written(tmp_path, files)).group_kills == 2


def test_a_terminal_that_was_typed_into_is_a_person_until_it_has_been_quiet(tmp_path: Path) -> None:
    terminal = written(tmp_path, {"dev/pts/0": "", "dev/pts/ptmx": ""}) / "dev/pts/0"
    os.utime(tmp_path / "dev/pts/ptmx", (2000, 2000))
    # Its output, which may be our own log, is newer than its input.
    os.utime(terminal, (1000, 1900))
    for now, active in ((1000.0, True), (1300.0, True), (1301.0, False)):
        asked = sensors.Sensors(user_idle_seconds=300, user_cpu_share=1.0, root=tmp_path, now=partial(float, now))
        assert bool(asked().user_active) is active


def test_a_machine_without_sensors_says_so(tmp_path: Path) -> None:
    found = sensors.Sensors(user_idle_seconds=300, user_cpu_share=1.0, root=tmp_path)()

    assert (found.battery_percent, found.on_battery, found.temperature_celsius) == (None, False, None)
    assert found.user_active is None


def test_battery_and_temperature_are_read_from_the_system(tmp_path: Path) -> None:
    files = {
        "sys/class/power_supply/BAT0/type": "Battery",
        "sys/class/power_supply/BAT0/capacity": "21",
        "sys/class/power_supply/BAT0/status": "Discharging",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
        "sys/class/thermal/thermal_zone0/temp": "71500",
    }
    found = sensors.Sensors(user_idle_seconds=300, user_cpu_share=1.0, root=written(tmp_path, files))()

    assert (found.battery_percent, found.on_battery, found.temperature_celsius) == (21.0, True, 71.5)


def test_work_of_other_programs_is_a_person_and_our_own_is_not() -> None:
    seconds = iter([0.0, 1e-9, 1e9])
    asked = sensors.Sensors(user_idle_seconds=1, user_cpu_share=0.5, root=Path("/nowhere"), now=lambda: next(seconds))

    assert asked().user_active is None, "one reading tells no load"
    subprocess.run([sys.executable, "-c", "sum(range(10**6))"], check=True)
    busy = asked().user_active
    assert busy is not None
    assert "other programs" in busy, "their processor time, over next to no time"
    assert asked().user_active == "", "the same, over thirty years"


# ── a real kernel ─────────────────────────────────────────────────────────────────────────────────────────────────

WATCHED = """
import json, sys
from dataclasses import asdict
from edge_runtime import sensors
print(json.dumps(asdict(sensors.kernel())), flush=True)
exec(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("death", "expected"),
    [("held = bytearray(b'x' * (512 << 20))", "memory"), ("import os, signal; os.kill(os.getpid(), 9)", "other")],
)
def test_a_real_kill_is_told_from_another(death: str, expected: str) -> None:
    """The kernel kills a process of a small control group; the next process of that group finds out why."""
    limit = impose(f"edge-runtime-survival-{os.getpid()}", 128 * MIB)
    if limit.group is None:
        pytest.skip(f"this machine lets nobody here limit memory: {limit.reason}")
    try:
        lives = [
            subprocess.run(
                limit.command([sys.executable, "-c", WATCHED, last]), capture_output=True, text=True, check=False
            )
            for last in (death, "pass")
        ]
    finally:
        limit.release()

    then, now = (Kernel(**json.loads(life.stdout)) for life in lives)

    assert [life.returncode for life in lives] == [-signal.SIGKILL, 0]
    assert then.group_kills is not None
    assert verdict(Mark("training", 1, then), now) == expected
