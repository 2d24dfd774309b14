"""Fine-tune a language model on one machine, for its owner alone: no server, no network, and an adapter to keep.

python examples/personal_finetuning.py --data my.jsonl --steps 100 --out my-adapter
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.train import base, data, evaluating, families, fresh, generate, loop, metrics, trackers
from edge_runtime.train.generate import Decoding
from edge_runtime.train.live import LiveModel
from export import peft, subject

SCALING = 2.0  # PEFT's lora_alpha / r
LENGTH = 128  # tokens of an example, at most
HOW = Decoding(max_new_tokens=24)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2", help="alias, Hugging Face folder, GGUF file or hub id")
    parser.add_argument("--precision", default="nf4", choices=("nf4", "int8", "bf16", "fp32"))
    parser.add_argument("--compute", default="fp32", choices=("fp32", "bf16"), help="what arithmetic is done in")
    parser.add_argument("--data", default="stdlib-docs:numbers", help="a JSONL file, or stdlib-docs:GROUP")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=8, help="examples to evaluate on, at most")
    parser.add_argument("--report-to", default="jsonl", help="none, jsonl, tensorboard, wandb … or all")
    parser.add_argument("--out", type=Path, default=Path("personal-adapter"))
    return parser.parse_args()


def judge(live: LiveModel, tokenizer: Any, held_out: list[data.Example]) -> dict[str, float]:
    """Loss on all held-out examples, and how close the answers to a few of them come."""
    loss = evaluating.evaluate(live, data.tokenise_all(held_out, tokenizer, LENGTH).examples, batch=4).loss
    asked = [example for example in held_out if example.messages][:2]  # a plain text asks nothing
    answers = generate.task_metrics(live.model, tokenizer, asked, ["rouge_l"], HOW) if asked else {}
    return {"loss": loss, "perplexity": metrics.perplexity(loss), **answers}


def main() -> None:
    """Prepare, attach, evaluate, train, evaluate, export."""
    given, console = _arguments(), Console()
    prepared = base.prepare(given.base, precision=given.precision, say=console.print)
    loaded = base.load(prepared, compute_dtype=given.compute)
    train, held_out = data.split(data.load_examples(given.data))
    examples = data.tokenise_all(train, loaded.tokenizer, LENGTH).examples

    slot = fresh.slot_for(loaded.model, ["q_proj", "k_proj", "v_proj", "o_proj"], given.rank)
    lora = families.get("lora")
    live = lora.attach(loaded.model, slot, scaling=SCALING)
    lora.load(live, fresh.fresh_adapter(slot, seed=0))
    before = judge(live, loaded.tokenizer, held_out[: given.held_out])
    tracker = trackers.open_tracker(given.report_to, "personal", {"data": given.data, "rank": given.rank}, given.out)
    task = loop.LocalTask(steps=given.steps, learning_rate=2e-3, micro_batch=4)
    loop.train_round(live, examples, task, on_step=lambda at: tracker.log({"loss": at.loss}, at.step))
    after = judge(live, loaded.tokenizer, held_out[: given.held_out])
    tracker.log({f"held_out.{name}": value for name, value in after.items()}, given.steps)
    tracker.close()

    table = Table("held out", "before", "after", title=f"{prepared.label}, {given.steps} steps of 4 examples")
    for name, value in before.items():
        table.add_row(name, f"{value:.3f}", f"{after[name]:.3f}")
    console.print(table)
    peft.write(subject.Subject(lora.read_all(live), SCALING, prepared.label, prepared), given.out)
    console.print(f"adapter in {given.out}: PeftModel.from_pretrained(base, '{given.out}') loads it")


if __name__ == "__main__":
    try:
        main()
    except EdgeRuntimeError as error:
        raise SystemExit(str(error)) from None
