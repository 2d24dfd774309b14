"""How far are the predicted seconds of a step from the real ones?

The device is probed at the base's own shapes, then each configuration trains in a process of its own on texts of full
length. A machine is not equally fast from minute to minute, so the probe is repeated before each configuration, and the
median step counts.

    python -m benchmarks.speed_prediction [--quick] [--cache FOLDER]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.bases import random_base
from benchmarks.memory_prediction import EVERY, Case, _prepare, name_of, trained
from benchmarks.one_training import Job
from benchmarks.result import result
from edge_runtime.config import cache_dir
from profiles.device import DeviceProfile
from profiles.find_card import find_card
from profiles.speed import parts, seconds_per_step

GOALS = {"max_abs_error": ("<=", 0.30), "median_abs_error": ("<=", 0.15)}

CASES = (
    Case("smollm2", "nf4", 8, 32, 128, 1),
    Case("smollm2", "bf16", 8, 16, 256, 1, checkpointing=False),
    Case("smollm2", "int8", 8, 32, 128, 2),
    Case("llama-0.36b", "nf4", 8, 16, 256, 1),
    Case("smollm2", "nf4", 8, 16, 512, 1, layers=10),
    Case("smollm2", "nf4", 16, 32, 128, 4, checkpointing=False),
    Case("smollm2", "fp32", 8, 16, 128, 2, checkpointing=False, compute="fp32"),
    Case("smollm2", "nf4", 8, 16, 256, 1, targets=EVERY),
    Case("llama-0.36b", "bf16", 8, 16, 128, 2),
    Case("qwen-0.5b", "nf4", 8, 16, 128, 1, layers=6, checkpointing=False),
    Case("qwen-0.5b", "int8", 8, 16, 256, 1),
    Case("smollm2", "nf4", 2, 2, 64, 1, layers=1),
    Case("smollm2", "nf4", 16, 16, 256, 2, targets=EVERY, recomputed=24, products="fp32"),
    Case("llama-0.36b", "int8", 8, 16, 128, 2, products="fp32"),
    Case("qwen-0.5b", "bf16", 8, 16, 128, 1, layers=6, products="fp32"),
)
QUICK = CASES[:3]


def main() -> int:
    """Run all cases, print the table and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three cases")
    parser.add_argument("--cache", type=Path, default=cache_dir())
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--log", type=Path, help="append what was measured to this file, as JSON")
    parser.add_argument("--threads", type=int, default=0, help="of torch; by default as many as the device can use")
    options = parser.parse_args()
    console = Console(width=160)
    cases = QUICK if options.quick else CASES
    _prepare(cases, options.cache)
    errors = []
    table = Table(title="predicted and real seconds of a step", title_style="bold")
    for column in ("configuration", "predicted", "of which", "measured", "error"):
        table.add_column(column, justify="left" if column in ("configuration", "of which") else "right")
    for case in cases:
        base = random_base(case.base, options.cache)
        card = find_card(base)
        setting = case.setting(card)
        profile = _probed(base)
        threads = options.threads or max(1, min(profile.usable_cores, profile.physical_cores))
        found = trained(Job(base, setting, options.steps, 1, threads, str(options.cache), equal=True))
        measured = statistics.median(found["seconds"][1:])
        predicted = seconds_per_step(profile, card, setting)
        errors.append(predicted / measured - 1)
        if options.log:
            rates = {name: value for name, value in profile.to_json().items() if isinstance(value, float)}
            entry = {"base": case.base, "setting": asdict(setting), "rates": rates, **found}
            with options.log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")
        split = ", ".join(f"{name} {value:.2f}" for name, value in parts(profile, card, setting).items())
        row = (name_of(case), f"{predicted:.2f} s", split, f"{measured:.2f} s", f"{errors[-1]:+.0%}")
        table.add_row(*row)
        console.print("  ".join(row), style="dim")
    console.print(table)
    figures = {
        "configs": len(errors),
        "max_abs_error": round(max(map(abs, errors)), 3),
        "median_abs_error": round(statistics.median(map(abs, errors)), 3),
        "max_under": round(max(0.0, *(-error for error in errors)), 3),
    }
    return 0 if result("speed_prediction", figures, {"configs": (">=", 3 if options.quick else 8), **GOALS}) else 1


def _probed(base: str) -> DeviceProfile:
    """This device, measured by a fresh process at the base's own shapes."""
    done = subprocess.run(
        [sys.executable, "-m", "edge_runtime.cli", "profile", "--base", base, "--refresh", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return DeviceProfile.from_json(found["profile"])


if __name__ == "__main__":
    sys.exit(main())
