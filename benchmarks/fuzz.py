"""Does any input do harm? Mutated messages, blobs and topics against the decoder, the server and the device.

Each target runs in a process of its own whose memory is bounded by the kernel. Harm is a crash, an exception outside of
the error tree, or memory beyond the bound; the input that did it is written to a file.

    python -m benchmarks.fuzz [--quick] [--seed N] [--found FOLDER]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table

from benchmarks import fuzz_inputs, fuzz_targets
from benchmarks.resident import peak_bytes
from benchmarks.result import Goal, result

MIB = 2**20
BOUND = 512 * MIB
"""What a target may take on top of what its imports have taken."""
COUNTS = {
    "messages.load": 40_000, "codec.decode": 40_000, "topics.parse": 10_000, "blobs": 5_000, "server": 20_000,
    "new server": 3_000, "device": 20_000,
}  # fmt: skip
GOALS: dict[str, Goal] = {
    "inputs": (">=", 100_000),
    "crashes": ("==", 0),
    "outside_error_tree": ("==", 0),
    "peak_mib": ("<=", BOUND / MIB),
}


@dataclass(frozen=True)
class Outcome:
    """What a target came to.

    Attributes:
        inputs: how many it took.
        harm: how many made it raise what it must not.
        crashed: whether its process ended.
        peak_mib: memory on top of its imports.
        said: of the first harm.
    """

    inputs: int
    harm: int
    crashed: bool
    peak_mib: float
    said: str


def throw(target: str, count: int, seed: int, found: Path) -> Outcome:
    """Throw that many inputs at a target, in this process; what does harm is kept in the folder `found`."""
    draw = Random(f"{seed}:{target}")
    makers = fuzz_inputs.makers()
    before = peak_bytes()
    harm, said, done = 0, "", 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:  # noqa: S108
        if target in fuzz_targets.PLAIN:
            kind, call = fuzz_targets.PLAIN[target]
            kinds: tuple[str, ...] = (kind,)
            end = None
        else:
            kinds, make = fuzz_targets.ENDS[target]
            end = call = make(Path(place), draw)
        for _ in range(count):
            payload = makers[draw.choice(kinds)](draw)
            try:
                call(payload)
            except Exception:  # noqa: BLE001  that anything can come out of it is the question
                harm += 1
                said = said or traceback.format_exc(limit=-4)
                (found / f"{target.replace(' ', '-')}-{seed}-{done}").write_bytes(payload)
            done += 1
        if end is not None:
            end.close()
    peak = (peak_bytes() - before) / MIB
    return Outcome(done, harm, crashed=False, peak_mib=peak, said=said)


def in_a_child(target: str, count: int, seed: int, found: Path) -> Outcome:
    """`throw`, in a process whose memory is bounded."""
    command = [sys.executable, "-m", "benchmarks.fuzz", "--target", target, "--count", str(count), "--seed", str(seed)]
    ended = subprocess.run([*command, "--found", str(found)], check=False, capture_output=True, text=True)
    if ended.returncode == 0:
        return Outcome(**json.loads(ended.stdout.splitlines()[-1]))
    return Outcome(0, 0, crashed=True, peak_mib=0.0, said=f"code {ended.returncode}: {ended.stderr[-2000:]}")


def bound_memory() -> None:
    """Let the kernel refuse this process more than BOUND on top of what it has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    most = pages * resource.getpagesize() + BOUND
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> int:
    """Run it; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a twentieth of the inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--found", type=Path, help="folder for the inputs that do harm")
    parser.add_argument("--target", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=0, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    found = chosen.found or Path(tempfile.mkdtemp(prefix="edge-fuzz-"))
    found.mkdir(parents=True, exist_ok=True)
    if chosen.target:
        if sys.platform == "linux":
            bound_memory()
        print(json.dumps(vars(throw(chosen.target, chosen.count, chosen.seed, found))))
        return 0
    began, outcomes = time.monotonic(), {}
    table = Table("target", "inputs", "harm", "peak MiB")
    for target, count in COUNTS.items():
        outcomes[target] = outcome = in_a_child(target, count // 20 if chosen.quick else count, chosen.seed, found)
        table.add_row(
            target,
            f"{outcome.inputs:,}",
            "crashed" if outcome.crashed else str(outcome.harm),
            f"{outcome.peak_mib:.0f}",
        )
        if outcome.said:
            Console(stderr=True).print(f"{target}: {outcome.said}\n(inputs in {found})", markup=False)
    Console().print(table)
    goals = dict(GOALS)
    if chosen.quick:
        goals["inputs"] = (">=", 5_000)
    figures = {
        "inputs": sum(outcome.inputs for outcome in outcomes.values()),
        "crashes": sum(outcome.crashed for outcome in outcomes.values()),
        "outside_error_tree": sum(outcome.harm for outcome in outcomes.values()),
        "peak_mib": max(outcome.peak_mib for outcome in outcomes.values()),
        "seconds": time.monotonic() - began,
    }
    return 0 if result("fuzz", figures, goals) else 1


if __name__ == "__main__":
    sys.exit(main())
