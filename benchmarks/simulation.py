"""How large a fleet can be simulated, what does the simulator take beside real training, and what beside its peer?

    python -m benchmarks.simulation [--quick] [--only surrogate] [--only real] [--only flower] [--data FOLDER]

**surrogate**: the agent, rounds, store and aggregators of a real fleet, 5 % of the devices in each round, by the engine
`processes`. The first run is measured whole, from its file to its tables. Two more, of few rounds, ask as many devices
of a fleet that is ten times as large, and ten times as many of a fleet of that size: the seconds of a round should
follow those that take part, and not the fleet. What only happens once, every device's hello, is no part of these.

**real**: SmolLM2 on natural-instructions, `inline`. The overhead is defined in `benchmarks.simulation_real`; clients
take 8 local steps, a third of the default, so it weighs more than it does with the defaults. Memory is the largest
resident set of a process in which 64 clients take a step of one example in each of two rounds, over that of one in
which a single client has all their examples and takes as many steps.

**flower**: see `benchmarks.simulation_peer`; without `make peers` it is not run, and its goals are not met.

Each run is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import simulation_peer, simulation_real
from benchmarks.resident import peak_bytes
from benchmarks.result import Goal, result
from simulation import settings, tables
from simulation.world import World

GOALS: Mapping[str, Goal] = {
    "surrogate_seconds": ("<=", 300.0),
    "surrogate_peak_mb": ("<=", 2000.0),
    "fleet_exponent": ("<=", 0.5),
    "participants_exponent": ("<=", 1.15),
    "real_overhead": ("<=", 0.05),
    "memory_64_vs_1": ("<=", 1.3),
    "flower_speed_ratio": (">=", 3.0),
    "flower_memory_ratio": ("<=", 0.5),
}
PARTS = {
    "surrogate": ("surrogate_seconds", "surrogate_peak_mb", "fleet_exponent", "participants_exponent"),
    "real": ("real_overhead", "memory_64_vs_1"),
    "flower": ("flower_speed_ratio", "flower_memory_ratio"),
}
"""Part → the goals that it decides."""
KINDS = ("raspberry-pi-5", "jetson-orin-nano", "laptop-x86-16gb", "jetson-nano", "desktop-gpu")


def fleet(devices: int, rounds: int, fraction: float, engine: str) -> str:
    """The file of a fleet."""
    head = [
        "[rounds]", f"num_rounds = {rounds}", f"min_available_nodes = {devices}", f"fraction_train = {fraction}",
        "[simulation]", f'engine = "{engine}"', "examples = 50",
    ]  # fmt: skip
    for kind in KINDS:
        head += ["[[simulation.devices]]", f'device = "{kind}"', f"count = {devices // len(KINDS)}"]
        head += ["straggler_sigma = 0.3"]
    return "\n".join(head) + "\n"


def measure(devices: int, rounds: int, fraction: float, engine: str) -> dict[str, Any]:
    """One run: seconds of all of it, seconds of a round, and the most memory that all its processes had."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fleet.toml"
        path.write_text(fleet(devices, rounds, fraction, engine), encoding="utf-8")
        began = time.monotonic()
        world = World(*settings.load(path), Path(folder) / "out", say=lambda text: print(text, file=sys.stderr))
        merged: list[float] = []
        workers: list[int] = []

        def look(done: int, _of: int) -> None:
            workers.append(sum(child.memory_info().rss for child in psutil.Process().children(recursive=True)))
            if done:
                merged.append(time.monotonic())

        outcome = world.run(progress=look)
        tables.write(Path(folder), "rounds", outcome.versions)
        tables.write(Path(folder), "devices", outcome.devices)
        seconds = time.monotonic() - began
    first, last = outcome.versions[0], outcome.versions[-1]
    return {
        "seconds": seconds,
        # Between two merges lies exactly one round; before the first also the hellos of all.
        "round_seconds": (merged[-1] - merged[0]) / (len(merged) - 1),
        # Workers hold the same from their first task to their last, so a look at each merge sees their peak.
        "peak_mb": (peak_bytes() + max(workers)) / 1e6,
        "client_rounds": sum(row.updates for row in outcome.versions),
        "loss_first": first.loss,
        "loss_last": last.loss,
        "floor": last.floor,
        "virtual_hours": outcome.seconds / 3600,
        "finished": outcome.finished,
    }


def alone(devices: int, rounds: int, fraction: float, engine: str = "processes") -> dict[str, Any]:
    """The same in a process of its own."""
    told = [str(value) for value in (devices, rounds, fraction, engine)]
    command = [sys.executable, "-m", "benchmarks.simulation", "--one", *told]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured: dict[str, Any] = json.loads(found)
    return measured


def exponent(small: float, large: float, times: float) -> float:
    """How a cost grows when something becomes so many times as much: 0 not at all, 1 in proportion."""
    return math.log(large / small) / math.log(times)


def surrogate(console: Console, *, quick: bool) -> dict[str, float]:
    """How large a fleet can be simulated."""
    times = 10
    small, rounds = (50, 5) if quick else (1000, 50)
    shares = {
        "goal": (times * small, rounds, 0.05),
        "few of few": (small, 4, 0.1),
        "as few of many": (times * small, 4, 0.1 / times),
        "many of many": (times * small, 4, 0.1),
    }
    found = {what: alone(*share) for what, share in shares.items()}
    table = Table("devices", "in a round", "rounds", "seconds", "seconds of a round", "peak, MB", "loss (floor)")
    for what, (devices, count, fraction) in shares.items():
        one = found[what]
        table.add_row(
            f"{devices:,}", f"{round(devices * fraction):,}", str(count), f"{one['seconds']:.1f}",
            f"{one['round_seconds']:.2f}", f"{one['peak_mb']:.0f}", f"{one['loss_last']:.3f} ({one['floor']:.3f})",
        )  # fmt: skip
    console.print(table)
    goal = found["goal"]
    few, same, many = (found[what]["round_seconds"] for what in ("few of few", "as few of many", "many of many"))
    return {
        "surrogate_seconds": goal["seconds"],
        "surrogate_peak_mb": goal["peak_mb"],
        "devices": times * small,
        "client_rounds": goal["client_rounds"],
        "client_rounds_a_second": goal["client_rounds"] / goal["seconds"],
        "fleet_exponent": exponent(few, same, times),
        "participants_exponent": exponent(same, many, times),
        "virtual_hours": goal["virtual_hours"],
    }


def real(console: Console, files: Sequence[str], *, quick: bool) -> dict[str, float]:
    """What the simulator takes beside real training."""
    clients, many, each = (2, 4, 100) if quick else (4, 64, 150)
    least = partial(simulation_real.Run, files, rounds=2, batch=1, held_out=1)
    runs = {
        "overhead": simulation_real.Run(files, clients, rounds=2, steps=8),
        "one client": least(clients=1, steps=many, examples=many * each),
        f"{many} clients": least(clients=many, steps=1, examples=each),
    }
    found = {what: simulation_real.alone(run) for what, run in runs.items()}
    table = Table("", "client-rounds", "seconds", "training", "evaluating", "reading the base", "overhead", "peak, MB")
    for what, one in found.items():
        table.add_row(
            what, str(runs[what].clients * runs[what].rounds), f"{one['seconds']:.0f}", f"{one['training']:.0f}",
            f"{one['evaluating']:.0f}", f"{one['loading']:.1f}", f"{one['overhead']:.1%}", f"{one['peak_mb']:.0f}",
        )  # fmt: skip
    console.print(table)
    return {
        "real_overhead": found["overhead"]["overhead"],
        "memory_64_vs_1": found[f"{many} clients"]["peak_mb"] / found["one client"]["peak_mb"],
        "peak_mb_of_1": found["one client"]["peak_mb"],
    }


def flower(console: Console, files: Sequence[str], overlay: Path, *, quick: bool) -> dict[str, float]:
    """What the simulator takes beside Flower's; nothing where that is not installed."""
    if not simulation_peer.installed(overlay):
        console.print(
            f"[bold]flower: not run[/bold]: expected flwr and ray in {overlay}, found none; `{simulation_peer.HOW}`"
        )
        return {}
    toy = simulation_peer.toy_of(files, quick=quick)
    found = simulation_peer.side_by_side(toy, overlay, 1 if quick else 3)
    console.print(simulation_peer.table(toy, found))
    return simulation_peer.figures_of(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure one run after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small fleets, few rounds, no repetition")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part, and those that are named as well")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/natural-instructions"), help="*.train.jsonl")
    parser.add_argument("--overlay", type=Path, default=simulation_peer.OVERLAY, help="where `make peers` put Flower")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.one:
        devices, rounds, fraction, engine = chosen.one
        print(json.dumps(measure(int(devices), int(rounds), float(fraction), engine)))
        return 0
    parts, console = chosen.only or [*PARTS], Console(width=150)
    files = sorted(str(path.resolve()) for path in chosen.data.glob("*.train.jsonl"))
    if not files and set(parts) - {"surrogate"}:
        raise SystemExit(f"expected *.train.jsonl in {chosen.data}; found none; choose another folder with --data")
    figures: dict[str, float] = {}
    if "surrogate" in parts:
        figures |= surrogate(console, quick=chosen.quick)
    if "real" in parts:
        figures |= real(console, files, quick=chosen.quick)
    if "flower" in parts:
        figures |= flower(console, files, chosen.overlay, quick=chosen.quick)
    goals = {goal: GOALS[goal] for part in parts for goal in PARTS[part]}
    return 0 if result("simulation", figures, goals) else 1


if __name__ == "__main__":
    sys.exit(main())
