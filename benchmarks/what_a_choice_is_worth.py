"""What is each choice of a plan worth? One choice is changed at a time, and the loss on held-out text is compared.

The base trains one round on one subject of the standard library's documentation (SmolLM2-135M); the figures are the
source of the gains in profiles/worth.py. One device and few seeds: an order of magnitude, no more.

    python -m benchmarks.what_a_choice_is_worth [--quick] [--seeds N] [--cache FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.memory_prediction import ATTENTION, EVERY
from benchmarks.result import result
from edge_runtime.config import cache_dir


@dataclass(frozen=True)
class Choice:
    """How one process trains; lengths are of training, evaluation always sees `EVALUATED` tokens."""

    layers: int = 30
    rank: int = 8
    precision: str = "nf4"
    targets: tuple[str, ...] = ATTENTION
    trained: tuple[str, ...] = ATTENTION
    length: int = 128
    steps: int = 24
    seed: int = 0
    subject: str = "networking"


EVALUATED = 256
REFERENCE = Choice()
CHANGES: tuple[dict[str, Any], ...] = (
    *({"layers": count} for count in (1, 3, 6, 10, 20)),
    *({"rank": rank} for rank in (2, 4, 16, 64)),
    *({"precision": name} for name in ("int8", "bf16")),
    {"trained": ("q_proj", "v_proj")},
    {"targets": EVERY, "trained": EVERY},
    *({"length": length} for length in (32, 64, 256)),
)
QUICK: tuple[dict[str, Any], ...] = ({"layers": 6}, {"precision": "bf16"})


def main() -> int:
    """Run every change and the reference, print the table and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two changes")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2)))
    parser.add_argument("--cache", type=Path, default=cache_dir())
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_train(Choice(**json.loads(options.one)), options.cache)), flush=True)
        return 0
    subjects = ("networking", "data")
    changes: list[dict[str, Any]] = [{}, *(QUICK if options.quick else CHANGES)]
    jobs = [
        replace(REFERENCE, steps=options.steps, seed=seed, subject=subjects[seed % len(subjects)], **change)
        for change in changes
        for seed in range(options.seeds)
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda job: _in_process(job, options.cache), jobs))
    losses = [found[at : at + options.seeds] for at in range(0, len(found), options.seeds)]
    reference = statistics.mean(one["before"] - one["after"] for one in losses[0])
    table = Table(title=f"one round of {options.steps} steps; the reference falls by {reference:.3f} nats")
    for column in ("change", "before", "after", "worth, in hundredths of the fall"):
        table.add_column(column)
    worths: dict[str, float] = {}
    for change, runs in zip(changes, losses, strict=True):
        # Against the reference on the same subject: what the round ends at is what counts, wherever it began.
        gains = [(base["after"] - one["after"]) / reference for base, one in zip(losses[0], runs, strict=True)]
        name = ", ".join(
            f"{key} {value if not isinstance(value, tuple) else len(value)}" for key, value in change.items()
        )
        worths[name or "reference"] = round(100 * statistics.mean(gains), 1)
        before, after = (statistics.mean(one[key] for one in runs) for key in ("before", "after"))
        table.add_row(name or "reference", f"{before:.3f}", f"{after:.3f}", f"{worths[name or 'reference']:+.1f}")
    Console(width=120).print(table)
    figures = {"fall": round(reference, 4), "seeds": options.seeds, **worths}
    return 0 if result("what_a_choice_is_worth", figures, {"fall": (">", 0.0)}) else 1


def _in_process(job: Choice, cache: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.what_a_choice_is_worth", "--cache", str(cache)]
    done = subprocess.run(
        [*command, "--one", json.dumps(asdict(job))], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{job} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _train(choice: Choice, cache: Path) -> dict[str, float]:
    import numpy as np  # noqa: PLC0415 - each training has a process of its own
    import torch  # noqa: PLC0415 - as above

    from edge_runtime.lora.adapter import Adapter, LayerSlot, Pair, Slot  # noqa: PLC0415 - as above
    from edge_runtime.train import data, evaluating, loop  # noqa: PLC0415 - as above
    from edge_runtime.train.base import load, prepare  # noqa: PLC0415 - as above
    from edge_runtime.train.families import get  # noqa: PLC0415 - as above
    from profiles.card import card_from_config  # noqa: PLC0415 - as above
    from profiles.memory import Setting  # noqa: PLC0415 - as above
    from profiles.plan import layers  # noqa: PLC0415 - as above

    torch.set_num_threads(1)
    prepared = prepare("smollm2", precision=choice.precision, cache=cache)
    base = load(prepared, compute_dtype="bf16")
    train, held_out = data.split(data.load_examples(f"stdlib-docs:{choice.subject}"), fraction=0.15)
    tokens = data.tokenise_all(train, base.tokenizer, choice.length).examples
    unseen = data.tokenise_all(held_out[:32], base.tokenizer, EVALUATED).examples
    setting = Setting(
        tuple(choice.targets), choice.rank, choice.rank, choice.layers, trained_modules=tuple(choice.trained)
    )
    slot = Slot({n: LayerSlot(*layer) for n, layer in layers(setting, card_from_config(prepared.folder)).items()})
    live = get("lora").attach(base.model, slot, scaling=2.0)
    draw = np.random.default_rng(choice.seed)
    start = Adapter({
        name: Pair(
            (0.577 * np.linalg.qr(draw.standard_normal((layer.d_in, layer.held)))[0].T).astype(np.float32),
            np.zeros((layer.d_out, layer.held), np.float32),
        )
        for name, layer in slot.layers.items()
    })  # fmt: skip
    get("lora").load(live, start)
    before = evaluating.evaluate(live, unseen).loss
    task = loop.LocalTask(
        steps=choice.steps, learning_rate=2e-3, micro_batch=4, warmup_steps=2, seed=choice.seed
    )  # fmt: skip
    loop.train_round(live, tokens, task)
    return {"before": before, "after": evaluating.evaluate(live, unseen).loss}


if __name__ == "__main__":
    sys.exit(main())
