"""How far is the predicted peak of training from the real one?

Each configuration trains in a process of its own, on the client's path and on real text, and its peak is what the
kernel says it was (VmHWM, pages of files included); on a GPU, what torch's allocator reserved.

    python -m benchmarks.memory_prediction [--quick] [--only TEXT] [--cache FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.bases import random_base
from benchmarks.one_training import Job
from benchmarks.result import result
from edge_runtime.config import cache_dir
from profiles.card import ModelCard
from profiles.find_card import find_card
from profiles.memory import Setting, estimate

MIB = 2**20
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERY = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

GOALS = {"max_abs_error": ("<=", 0.10), "median_abs_error": ("<=", 0.04), "max_under": ("<=", 0.05)}


@dataclass(frozen=True)
class Case:
    """One configuration: a base and how it is trained; `layers` None for all of them."""

    base: str
    precision: str
    rank: int
    held: int
    length: int
    micro_batch: int
    layers: int | None = None
    checkpointing: bool = True
    targets: tuple[str, ...] = ATTENTION
    compute: str = "bf16"
    recomputed: int | None = None
    optimizer: str = "adamw"
    products: str | None = None

    def setting(self, card: ModelCard) -> Setting:
        """As the planner writes it."""
        return Setting(
            target_modules=self.targets, rank=self.rank, held=self.held, layers_trained=self.layers or card.num_layers,
            precision=self.precision, compute_dtype=self.compute, micro_batch=self.micro_batch, max_length=self.length,
            gradient_checkpointing=self.checkpointing, recomputed_layers=self.recomputed, optimizer=self.optimizer,
            product_dtype=self.products,
        )  # fmt: skip


CASES = (
    Case("smollm2", "nf4", 2, 2, 64, 1, layers=1),
    Case("smollm2", "nf4", 8, 32, 128, 1),
    Case("qwen-0.5b", "nf4", 8, 16, 128, 1),
    Case("llama-0.36b", "nf4", 8, 16, 256, 1, checkpointing=False),
    Case("smollm2", "nf4", 8, 16, 256, 2),
    Case("smollm2", "nf4", 64, 64, 128, 1),
    Case("smollm2", "nf4", 64, 64, 64, 1, targets=EVERY, optimizer="adamw_8bit"),
    Case("smollm2", "nf4", 8, 32, 256, 4, recomputed=15),
    Case("smollm2", "nf4", 16, 16, 512, 1, checkpointing=False),
    Case("smollm2", "nf4", 8, 32, 256, 2, checkpointing=False, targets=EVERY),
    Case("smollm2", "nf4", 4, 4, 128, 4, layers=10, checkpointing=False),
    Case("smollm2", "nf4", 8, 16, 128, 2, compute="fp32"),
    Case("smollm2", "int8", 8, 32, 256, 1),
    Case("smollm2", "int8", 16, 32, 128, 4, checkpointing=False),
    Case("smollm2", "bf16", 8, 16, 256, 4),
    Case("smollm2", "bf16", 16, 32, 128, 2, checkpointing=False),
    Case("smollm2", "fp32", 8, 16, 256, 1, checkpointing=False, compute="fp32"),
    Case("smollm2", "nf4", 16, 16, 256, 2, targets=EVERY, recomputed=24, products="fp32"),
    Case("smollm2", "bf16", 8, 16, 256, 2, products="fp32"),
    Case("smollm2", "fp16", 8, 16, 128, 4, products="fp32"),
    Case("llama-0.36b", "nf4", 8, 32, 128, 2, layers=8),
    Case("llama-0.36b", "int8", 16, 16, 256, 1),
    Case("llama-0.36b", "bf16", 8, 16, 128, 1, checkpointing=False),
    Case("qwen-0.5b", "nf4", 4, 32, 256, 1, layers=6, checkpointing=False),
    Case("qwen-0.5b", "int8", 8, 16, 128, 2),
    Case("qwen-0.5b", "int8", 8, 16, 256, 1, products="fp32"),
    Case("qwen-0.5b", "bf16", 8, 8, 128, 1, targets=EVERY),
    Case("qwen-0.5b", "nf4", 8, 16, 512, 1),
)
QUICK = CASES[:4]


def main() -> int:
    """Run all cases, print the table and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="four cases")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--cache", type=Path, default=cache_dir())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--log", type=Path, help="append what every process took to this file, as JSON")
    options = parser.parse_args()
    console = Console(width=150)
    cases = [case for case in (QUICK if options.quick else CASES) if options.only in name_of(case)]
    _prepare(cases, options.cache)
    errors = []
    table = Table(title="predicted and real peak of training", title_style="bold")
    for column in ("configuration", "predicted", "measured", "error"):
        table.add_column(column, justify="left" if column == "configuration" else "right")
    for case in cases:
        card = find_card(random_base(case.base, options.cache))
        setting = case.setting(card)
        predicted = estimate(card, setting, "gpu" if options.device == "cuda" else "host").total
        found = trained(Job(
            random_base(case.base, options.cache), setting, options.steps, 1, 1, str(options.cache), options.device
        ))  # fmt: skip
        errors.append(predicted / found["peak"] - 1)
        if options.log:
            with options.log.open("a", encoding="utf-8") as log:
                log.write(json.dumps({"base": case.base, "setting": asdict(setting), **found}) + "\n")
        row = (name_of(case), f"{predicted / MIB:.0f} MiB", f"{found['peak'] / MIB:.0f} MiB", f"{errors[-1]:+.1%}")
        table.add_row(*row)
        console.print("  ".join(row), style="dim")
    console.print(table)
    figures = {
        "configs": len(errors),
        "max_abs_error": round(max(map(abs, errors)), 4),
        "median_abs_error": round(statistics.median(map(abs, errors)), 4),
        "max_under": round(max(0.0, *(-error for error in errors)), 4),
    }
    return 0 if result("memory_prediction", figures, {"configs": (">=", 4 if options.quick else 16), **GOALS}) else 1


def name_of(case: Case) -> str:
    """The case in a few words."""
    layers = f"last {case.layers} layers" if case.layers else "all layers"
    checkpointing = ", checkpointing" if case.checkpointing else ""
    recomputed = f" of {case.recomputed} layers" if case.recomputed is not None else ""
    types = f"{case.compute}, {case.products} products" if case.products else case.compute
    optimizer = f", {case.optimizer}" if case.optimizer != "adamw" else ""
    return (
        f"{case.base}, {case.precision} ({types}), rank {case.rank} of {case.held}, {layers}, "
        f"{len(case.targets)} modules, {case.micro_batch} x {case.length} tokens{checkpointing}{recomputed}{optimizer}"
    )


def trained(job: Job) -> dict[str, Any]:
    """What one training took, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.one_training", job.to_json()],
        capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"a training ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _prepare(cases: Sequence[Case], cache: Path) -> None:
    """Convert what is needed in other processes: what conversion takes is not what training takes."""
    for base, precision in sorted({(case.base, case.precision) for case in cases}):
        code = (
            "import sys; from pathlib import Path; from benchmarks.bases import random_base; "
            "from edge_runtime.train.base import prepare; cache = Path(sys.argv[3]); "
            "prepare(random_base(sys.argv[1], cache), precision=sys.argv[2], cache=cache)"
        )
        subprocess.run([sys.executable, "-c", code, base, precision, str(cache)], check=True)


if __name__ == "__main__":
    sys.exit(main())
