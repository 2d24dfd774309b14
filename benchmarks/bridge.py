"""Does a simulated fleet learn what the real one learns, to the last bit, and does it take as long as predicted?

SmolLM2 learns docstrings of the standard library on devices of unlike ranks: once as processes over Mosquitto, each
client with one thread on a core of its own, and once in virtual time with the profile that this machine was probed to
have, from the same file. A machine is not equally fast from minute to minute, so it is probed right before.

    python -m benchmarks.bridge [--quick] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks import bridge_fleet
from benchmarks.bridge_fleet import Ran
from benchmarks.result import result
from edge_runtime.train.base import prepare
from edge_runtime.train.data import load_examples, tokenise_all
from edge_runtime.train.stdlib_docs import GROUPS, doc_pairs

GOALS = {
    "same_adapter": ("==", 1), "largest_difference": ("<=", 0.0), "same_plans": ("==", 1),
    "median_abs_error": ("<=", 0.30),
}  # fmt: skip
"""The times are to be within what the speed model promises of a step, at most."""

CHOICES = ("rank = 8, held = 16", "rank = 4, held = 8", "rank = 2, held = 2, layers_trained = 10")
EXAMPLES, LONGEST = 240, 128

FILE = """
[fleet]
name = "bridge"
[broker]
port = {port}
[rounds]
num_rounds = {rounds}
min_available_nodes = {devices}
[adapter]
max_rank = 8
max_length = {longest}
[aggregator]
rank = 16
[training]
max_steps = {steps}
personal_steps = 0
[device]
threads = 1
eval_examples = 4
[simulation]
trainer = "real"
base = "smollm2"
example_tokens = {tokens}
data = ["{data}"]
"""
GROUP = """
[[simulation.devices]]
name = "device-{number}"
device = "{profile}"
owner = {{ {choices} }}
"""


def main() -> int:
    """Run both ways, print the tables and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rounds of three steps")
    parser.add_argument("--keep", type=Path, help="a new folder for all that is written; a temporary one when absent")
    options = parser.parse_args()
    devices = min(len(CHOICES), max(2, len(os.sched_getaffinity(0))))
    rounds, steps = (2, 3) if options.quick else (3, 8)
    place: AbstractContextManager[str] = (
        nullcontext(str(options.keep)) if options.keep else tempfile.TemporaryDirectory(prefix="edge-bridge-")
    )
    with place as name:
        folder = Path(name).absolute()
        folder.mkdir(exist_ok=True)
        with bridge_fleet.broker(folder) as port:
            profile = _probed(folder, port)
            file = _written(folder, port, profile, devices, rounds, steps)
            real = bridge_fleet.really(file, folder / "real")
        virtual = bridge_fleet.simulated(file, folder / "simulated")
    return 0 if _told(real, virtual, steps) else 1


def _probed(folder: Path, port: int) -> Path:
    """The profile of one core of this machine, with its link to the broker."""
    asked = ("profile", "--base", "smollm2", "--refresh", "--link", "--broker", f"127.0.0.1:{port}", "--json")
    path = folder / "this.json"
    path.write_text(bridge_fleet.said(folder, *asked, core=0), encoding="utf-8")
    return path


def _written(folder: Path, port: int, profile: Path, devices: int, rounds: int, steps: int) -> Path:
    data = folder / "docs.jsonl"
    rows = [
        {"prompt": pair.prompt, "completion": pair.completion, "label": group}
        for group in GROUPS
        for pair in doc_pairs(group)[: EXAMPLES // len(GROUPS)]
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokens = _mean_tokens(data)
    head = FILE.format(
        port=port, rounds=rounds, devices=devices, steps=steps, data=data, tokens=tokens, longest=LONGEST
    )
    groups = (GROUP.format(number=number, profile=profile, choices=CHOICES[number]) for number in range(devices))
    file = folder / "fleet.toml"
    file.write_text(head + "".join(groups), encoding="utf-8")
    return file


def _mean_tokens(data: Path) -> int:
    """Of an example, as the devices see it."""
    found = AutoTokenizer.from_pretrained(prepare("smollm2").folder)
    examples = tokenise_all(load_examples(str(data)), found, LONGEST).examples
    return round(statistics.mean(len(example.input_ids) for example in examples))


def _told(real: Ran, virtual: Ran, steps: int) -> bool:
    """The tables and the RESULT line."""
    console = Console(width=120)
    table = Table(title="seconds of a round", title_style="bold")
    for column in ("round", "predicted", "real", "predicted / real", "of which computing: predicted", "real"):
        table.add_column(column, justify="right")
    ratios = []
    for number, (ours, theirs) in enumerate(zip(virtual.rounds, real.rounds, strict=True), 1):
        ratios.append(ours.seconds / theirs.seconds)
        computing = (", ".join(f"{seconds:.1f}" for seconds in each.devices.values()) for each in (ours, theirs))
        table.add_row(str(number), f"{ours.seconds:.1f}", f"{theirs.seconds:.1f}", f"{ratios[-1]:.2f}", *computing)
    console.print(table)
    for name, plan in real.plans.items():
        console.print(
            f"{name}: {plan}{'' if virtual.plans.get(name) == plan else f'; simulated: {virtual.plans[name]}'}"
        )
    versions = sum(ours == theirs for ours, theirs in zip(virtual.versions, real.versions, strict=True))
    console.print(f"{versions} of {len(real.versions)} versions of the global adapter are the same bytes")
    figures = {
        "devices": len(real.plans),
        "rounds": len(real.rounds),
        "steps": steps,
        "same_adapter": virtual.versions == real.versions,
        "largest_difference": _largest_difference(real, virtual),
        "same_plans": virtual.plans == real.plans,
        "predicted_over_real": [round(ratio, 3) for ratio in ratios],
        "predicted_over_real_median": round(statistics.median(ratios), 3),
        "median_abs_error": round(abs(statistics.median(ratios) - 1), 3),
    }
    return result("bridge", figures, GOALS)


def _largest_difference(real: Ran, virtual: Ran) -> float:
    """Between the products of any layer of the last global adapters."""
    return max(float(np.abs(real.last[name].product() - virtual.last[name].product()).max()) for name in real.last)


if __name__ == "__main__":
    sys.exit(main())
