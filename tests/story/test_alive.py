"""A device that is really killed for its memory finds out, plans a smaller adapter, and takes part again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.demo.limits import Limit, impose
from edge_runtime.wire.broker import Settings, start
from tests.product import Launcher, Running, until
from tests.story.fleet import Fleet, Part
from tests.wire.conftest import require

pytestmark = [pytest.mark.story, pytest.mark.broker, pytest.mark.torch, pytest.mark.timeout(900)]

MIB = 1 << 20
NAME = "alive"
LARGE = ("device.precision=fp32", "device.micro_batch=32", "device.gradient_checkpointing=false", "device.rank=8")
"""A plan of some 800 MiB, nearly half of them activations."""

SETTINGS = {
    "num_rounds = 2": "num_rounds = 1",
    "batch_size = 2": "batch_size = 32",
    "max_length = 32": "max_length = 256",
    "max_steps = 16": "max_steps = 50",
}
"""A round that takes long enough to be killed in."""

GREEDY = """
import sys
held = []
print("ready", flush=True)
for line in sys.stdin:
    held.append(bytearray(b"x" * (16 << 20)))
    print("more", flush=True)
"""
"""A neighbour in the device's control group that takes more and more memory."""


def long_examples(path: Path) -> Path:
    """Completions of some hundred tokens."""
    rows = [
        {"prompt": f"say {n}", "completion": " ".join(f"w{(n * at + at * at) % 10}" for at in range(40 + n))}
        for n in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def limit() -> Iterator[Limit]:
    found = impose(f"edge-runtime-alive-{os.getpid()}", 1024 * MIB)
    if found.group is None:
        pytest.skip(f"this machine lets nobody here limit memory: {found.reason}")
    yield found
    found.release()


@pytest.fixture
def fleet(limit: Limit, tiny_base: Path, tmp_path: Path) -> Iterator[Fleet]:
    """A server and one device; its processes end before the limit that they run under."""
    from edge_runtime.train.source import fingerprint, resolve  # noqa: PLC0415 - belongs to an extra

    require("nats")
    broker = start("nats", store=tmp_path / "broker", settings=Settings(ack_wait_s=2.0), patience=90.0)
    part = Part(NAME, long_examples(tmp_path / "examples.jsonl"), tiny_base, LARGE)
    launcher = Launcher(tmp_path / "fleet", {"EDGE_RUNTIME_CACHE": str(tmp_path / "cache")})
    made = Fleet(launcher, broker.address, fingerprint(resolve(str(tiny_base))), (part,))
    text = made.file.read_text(encoding="utf-8")
    for old, new in SETTINGS.items():
        assert old in text
        text = text.replace(old, new)
    made.file.write_text(text, encoding="utf-8")
    yield made
    launcher.end()
    broker.stop()


def begun(fleet: Fleet, limit: Limit) -> Running:
    """The device's next process, under the limit; it trains."""
    assert limit.group is not None
    before = len([event for event in fleet.events("report") if event["state"] == "training"])
    running = fleet.start(NAME)
    (limit.group / "cgroup.procs").write_text(str(running.process.pid))
    until(
        lambda: len([event for event in fleet.events("report") if event["state"] == "training"]) > before,
        "a step of training",
    )
    return running


def starve(limit: Limit, victim: Running) -> None:
    """Take memory from the device's group until the kernel kills the device, which it is told to prefer."""
    Path(f"/proc/{victim.process.pid}/oom_score_adj").write_text("1000")
    with subprocess.Popen(
        limit.command([sys.executable, "-c", GREEDY]), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as neighbour:
        assert neighbour.stdin is not None
        assert neighbour.stdout is not None
        for _ in range(1024 // 16):
            neighbour.stdout.readline()
            if victim.process.poll() is not None:
                break
            neighbour.stdin.write(b"more\n")
            neighbour.stdin.flush()
        victim.process.wait(60)
        neighbour.kill()


def test_a_device_knows_a_kill_by_the_kernel_from_a_kill_by_a_person_and_steps_down(fleet: Fleet, limit: Limit) -> None:
    fleet.start("server")
    first = begun(fleet, limit)
    first.kill()

    second = begun(fleet, limit)
    assert "but not for want of memory" in second.said
    starve(limit, second)
    assert second.process.returncode == -signal.SIGKILL

    third = begun(fleet, limit)
    assert "the kernel killed this device for its memory while training round 1" in third.said
    assert fleet.codes() == {"server": 0, NAME: 0}

    planned = [event["detail"] for event in fleet.events("report") if event["state"] == "planned"]
    assert len(planned) == 3
    assert planned[0] == planned[1]
    assert planned[2].split("≤")[0] != planned[0].split("≤")[0]
    assert "the kernel killed this device for its memory" in planned[2]
    assert fleet.updates() == [(1, NAME)]
    assert sum(event["state"] == "done" for event in fleet.events("report")) == 1
