"""One aggregation in a process of its own, because the peak of its memory is asked; answers with one JSON line."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.aggregation_fleet import Layers, round_of
from benchmarks.resident import peak_bytes
from server.aggregators.increment import increment
from server.scratch import Scratch

LLAMA_7B: Layers = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096)),
    **dict.fromkeys(("gate_proj", "up_proj"), (11008, 4096)),
    "down_proj": (4096, 11008),
}
LLAMA_405B: Layers = {
    **dict.fromkeys(("q_proj", "o_proj"), (16384, 16384)),
    **dict.fromkeys(("k_proj", "v_proj"), (1024, 16384)),
    **dict.fromkeys(("gate_proj", "up_proj"), (53248, 16384)),
    "down_proj": (16384, 53248),
}
BLOCKS_7B, BLOCKS_405B = 32, 126
RANK = 64


def merged(layers: Layers, clients: int) -> Mapping[str, Any]:
    """Make a round on the disk, merge it into the disk, and tell what that took.

    Returns:
        `seconds` and `cpu_seconds` of the merge without the making, `peak_mb` of the process, `disk_mb`, and each
        layer's report.
    """
    with tempfile.TemporaryDirectory() as folder:
        room = Scratch(Path(folder), memory=0)
        state, updates = round_of(layers, clients, RANK, room)
        began, cpu = time.perf_counter(), time.process_time()
        found = increment().combine(state, updates)
        return {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu,
            "peak_mb": peak_bytes() / 1e6,
            "disk_mb": room.written / 2**20,
            "layers": {name: vars(report) for name, report in found.layers.items()},
        }


def apart(shapes: Layers, clients: int) -> Mapping[str, Any]:
    """The same in a process of its own.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    task = json.dumps([shapes, clients])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.aggregation_round", task], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.stderr.write(done.stderr)
        done.check_returncode()
    told: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def blocks(layers: Layers, count: int) -> Layers:
    """The layers of so many equal blocks."""
    return {f"{block:03}.{name}": shape for block in range(count) for name, shape in layers.items()}


if __name__ == "__main__":
    asked, clients = json.loads(sys.argv[1])
    print(json.dumps(merged({name: (shape[0], shape[1]) for name, shape in asked.items()}, clients)))
