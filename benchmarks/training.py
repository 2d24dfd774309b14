"""Is training here faster and leaner than by the stock stack, and does it learn the same?

The stock stack is Hugging Face's Trainer with PEFT, bitsandbytes, gradient checkpointing and padding to the longest of
a micro-batch, at the best of micro-batch 1, 2 and 8 for each figure. Both train SmolLM2-135M-Instruct in 4 bits (the
same prepared weights), rank 16 on all linear layers, on the same examples of at most 512 tokens in the same order, 8 to
a step, each run in a process of its own, in turn. Ours passes 768 tokens at once and recomputes 28 of 30 layers: what a
plan takes that has the memory to keep the others. It multiplies in the type that is the faster one on this machine;
where that is float32, the stock stack runs in float32 as well as in bfloat16, and each of its figures is its best.

    python -m benchmarks.training [--quick] [--data FOLDER or SOURCE] [--cache FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.result import result
from benchmarks.training_runs import EVERY, Run
from edge_runtime.config import cache_dir
from profiles.find_card import find_card
from profiles.measure import BF16_WORTHWHILE
from profiles.memory import Setting
from profiles.speed import operations

MIB, MB = 2**20, 10**6
STOCK_BATCHES = (1, 2, 8)
STOCK_BATCHES_FP32 = (2, 8)
GOALS = {
    "tokens_ratio": (">=", 1.6),
    "memory_ratio": ("<=", 0.40),
    "loss_ratio": ("<=", 1.01),
    "loss_ratio_least": (">=", 0.99),
    "smallest_peak_mb": ("<=", 620.0),
}

# Operation → what it belongs to; the first text that an operation's name holds decides.
KINDS: Sequence[tuple[str, str]] = (
    ("dequantize", "opening 4-bit weights"),
    ("bmm", "attention"),
    ("softmax", "attention"),
    ("_Attention", "attention"),
    ("::mm", "products"),
    ("addmm", "adapters added to products"),
    ("silu", "gates, norms, rotations, casts"),
    ("Backward", "autograd and Python"),
    ("autograd::", "autograd and Python"),
    ("_AdaptedProduct", "autograd and Python"),
    ("aten::", "gates, norms, rotations, casts"),
)


def main() -> int:
    """Run both, print the tables and the RESULT line."""
    options = _options()
    console = Console(width=150)
    data = options.data if Path(options.data).is_dir() or ":" in options.data else "stdlib-docs:numbers"
    threads = max(1, min(psutil.cpu_count(logical=False) or 1, len(psutil.Process().cpu_affinity())))
    run = Run(
        "ours",
        str(options.cache),
        data,
        steps=options.steps,
        threads=threads,
        pack_tokens=options.pack_tokens,
        recomputed_layers=options.recomputed_layers,
    )
    did("prepare", run)
    floor = did("floor", run)["peak"]
    rates = did("rate", run)
    run = replace(run, products=_faster(rates))
    rivals = _rivals(run)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rivals}
    for repetition in range(options.repetitions or (1 if options.quick else 3)):
        for name, rival in rivals.items():
            found[name].append(did(rival.who, rival))
            rate, peak = found[name][-1]["rate"], found[name][-1]["peak"]
            console.print(f"{repetition + 1}: {name}: {rate:.0f} tokens/s, {peak / MIB:.0f} MiB", style="dim")
    smallest = did(
        "ours",
        replace(
            run, batch=1, rank=8, full=True, steps=3, optimizer="adamw_8bit", recomputed_layers=None, products="bf16"
        ),
    )
    learnt = {
        who: did(who, replace(run, who=who, steps=options.learning_steps, evaluate=64, micro_batch=2))
        for who in ("stock", "ours")
    }
    rows = summaries(found, floor)
    console.print(_table(rows, floor))
    figures = figures_of(rows, learnt, smallest)
    gflops = rates[run.products]
    figures["gemm_share"] = round(gemm_share(rows["ours"]["rate"], gflops, run.recomputed_layers), 3)
    figures["gemm_gflops"] = round(gflops, 1)
    console.print(f"products: {run.products} ({rates['fp32']:.0f} GFLOP/s in fp32, {rates['bf16']:.0f} in bf16)")
    console.print(_where(did("profile", replace(run, steps=2))))
    return 0 if result("training", figures, GOALS) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repetition")
    parser.add_argument(
        "--data", default="../shared/data/natural-instructions", help="folder of *.train.jsonl, or source"
    )
    parser.add_argument("--cache", type=Path, default=cache_dir())
    parser.add_argument("--steps", type=int, default=4, help="of each timed run; the first one is not timed")
    parser.add_argument("--learning-steps", type=int, default=12, help="of the runs whose loss is compared")
    parser.add_argument("--pack-tokens", type=int, default=768, help="of ours at once")
    parser.add_argument(
        "--recomputed-layers", type=int, default=28, help="of ours: memory for time; 30 for all of them"
    )
    parser.add_argument("--repetitions", type=int, default=0)
    return parser.parse_args()


def _rivals(run: Run) -> dict[str, Run]:
    """Name → run: the stock stack in all its ways, then ours."""
    fp32 = STOCK_BATCHES_FP32 if run.products == "fp32" else ()
    stock = {
        f"stock, {kind}, micro-batch {size}": replace(run, who="stock", micro_batch=size, products=kind)
        for kind, sizes in (("bf16", STOCK_BATCHES), ("fp32", fp32))
        for size in sizes
    }
    return {**stock, "ours": run}


def summaries(found: Mapping[str, Sequence[Mapping[str, Any]]], floor: int) -> dict[str, dict[str, float]]:
    """Name → median rate, largest peak, and what of it lies above the floor."""
    return {
        name: {
            "rate": statistics.median(one["rate"] for one in runs),
            "peak": max(one["peak"] for one in runs),
            "above": max(one["peak"] for one in runs) - floor,
        }
        for name, runs in found.items()
    }


def figures_of(
    rows: Mapping[str, Mapping[str, float]], learnt: Mapping[str, Mapping[str, Any]], smallest: Mapping[str, Any]
) -> dict[str, float]:
    """The ratios: ours to the best of the stock stack, each figure for itself."""
    ours, stock = rows["ours"], [row for name, row in rows.items() if name != "ours"]
    ratio = learnt["ours"]["held_out"] / learnt["stock"]["held_out"]
    return {
        "tokens_ratio": round(ours["rate"] / max(row["rate"] for row in stock), 3),
        "memory_ratio": round(ours["above"] / min(row["above"] for row in stock), 3),
        "loss_ratio": round(ratio, 4),
        "loss_ratio_least": round(ratio, 4),
        "held_out_loss": round(learnt["ours"]["held_out"], 4),
        "training_loss_ratio": round(_mean(learnt["ours"]["losses"]) / _mean(learnt["stock"]["losses"]), 4),
        "tokens_per_second": round(ours["rate"], 1),
        "smallest_peak_mb": round(smallest["peak"] / MB, 1),
    }


def gemm_share(rate: float, gflops: float, recomputed: int | None) -> float:
    """The part of the measured rate of products that useful products reach, recomputed ones among them.

    Args:
        rate: tokens per second.
        gflops: of products at the model's own shapes, measured alone.
        recomputed: layers that are computed a second time for the backward pass.
    """
    card = find_card("smollm2")
    setting = Setting(
        target_modules=EVERY,
        rank=16,
        held=16,
        layers_trained=card.num_layers,
        max_length=128,
        recomputed_layers=recomputed,
    )
    counted = operations(card, setting)
    # Only completions reach the head, so it is left out: what remains is below the truth, not above it.
    head = 4 * setting.tokens * card.vocab_size * card.hidden_size
    per_token = (sum(counted.values()) - head) / setting.tokens
    return rate * per_token / (gflops * 1e9)


def did(who: str, run: Run) -> dict[str, Any]:
    """What one process found."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training_runs", replace(run, who=who).to_json()],
        capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(run.threads), "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{who} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _faster(rates: Mapping[str, float]) -> str:
    """The type that a plan would multiply in; see `profiles.measure`."""
    return "bf16" if rates["bf16"] >= BF16_WORTHWHILE * rates["fp32"] else "fp32"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _table(rows: Mapping[str, Mapping[str, float]], floor: int) -> Table:
    table = Table(
        title=f"one step of 8 examples, 4-bit, rank 16; import floor {floor / MIB:.0f} MiB", title_style="bold"
    )
    for column in ("", "real tokens/s", "peak", "above the floor", "speed", "memory"):
        table.add_column(column, justify="right" if column else "left")
    ours = rows["ours"]
    for name, row in rows.items():
        table.add_row(
            name, f"{row['rate']:.0f}", f"{row['peak'] / MIB:.0f} MiB", f"{row['above'] / MIB:.0f} MiB",
            f"{row['rate'] / ours['rate']:.2f}", f"{row['above'] / ours['above']:.2f}",
        )  # fmt: skip
    return table


def _where(profiled: Mapping[str, Any]) -> Table:
    """The time of one step by kind of operation; what no operation took is Python's."""
    sums: dict[str, float] = {}
    for name, seconds in profiled["operations"].items():
        kind = next((kind for text, kind in KINDS if text in name), "other")
        sums[kind] = sums.get(kind, 0.0) + seconds
    sums["autograd and Python"] = sums.get("autograd and Python", 0.0) + max(0.0, profiled["wall"] - sum(sums.values()))
    whole = sum(sums.values())
    table = Table(title="where a step's time goes", title_style="bold")
    table.add_column("")
    table.add_column("share", justify="right")
    for kind, seconds in sorted(sums.items(), key=lambda item: -item[1]):
        table.add_row(kind, f"{seconds / whole:.1%}")
    return table


if __name__ == "__main__":
    sys.exit(main())
