"""Rows in a format of your own, and a PyTorch loop of your own: the runtime gives the data, the adapter and the loss.

    python examples/own_dataset.py --data questions.jsonl

Each row is {"question": …, "answer": …}; without --data, rows that the script makes itself, bad ones among them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from edge_runtime.errors import DataError, EdgeRuntimeError
from edge_runtime.train import base, batches, data, families, fresh
from edge_runtime.train.data import Example, Message
from edge_runtime.train.loss import completion_loss

MADE = [json.dumps({"question": f"{n} + {n + 1}?", "answer": str(2 * n + 1)}) for n in range(2, 34)]
MADE += ['{"question": "9 + 9?"}', '{"question": "8 + 8?", "answer": ""}', "no JSON at all"]


def example_of(row: object) -> Example:
    """One row as a conversation, or a ValueError that says what is wrong with it."""
    found = row if isinstance(row, dict) else {}
    for key in ("question", "answer"):
        if not isinstance(found.get(key), str) or not found[key].strip():
            raise ValueError(f"expected a text as '{key}', found {found.get(key)!r}")
    return Example((Message("user", found["question"]), Message("assistant", found["answer"])))


def read(lines: list[str], console: Console) -> Iterator[Example]:
    """The good rows; the others are reported."""
    for number, line in enumerate(lines, start=1):
        try:
            yield example_of(json.loads(line))
        except ValueError as error:  # what json raises is one, too
            console.print(f"line {number} is left out: {error}", style="yellow")


def main() -> None:
    """Read, tokenise, attach, and train in a plain loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2", help="alias, Hugging Face folder, GGUF file or hub id")
    parser.add_argument("--precision", default="nf4", choices=("nf4", "int8", "fp32"))
    parser.add_argument("--data", type=Path, help="a JSONL file with such rows")
    parser.add_argument("--steps", type=int, default=12)
    given, console = parser.parse_args(), Console()
    examples = list(read(given.data.read_text(encoding="utf-8").splitlines() if given.data else MADE, console))
    if not examples:
        raise DataError("expected rows with a question and an answer; found none that is good")
    loaded = base.load(base.prepare(given.base, precision=given.precision, say=console.print), compute_dtype="fp32")
    tokens = data.tokenise_all(examples, loaded.tokenizer, 128).examples
    console.print(f"{len(tokens)} examples, {sum(example.learned for example in tokens)} tokens to learn")
    lora, slot = families.get("lora"), fresh.slot_for(loaded.model, ["q_proj", "v_proj"], 8)
    live = lora.attach(loaded.model, slot, scaling=2.0)
    lora.load(live, fresh.fresh_adapter(slot))
    optimizer = torch.optim.AdamW(lora.trainable(live).values(), lr=2e-3)
    table = Table("step", "nats per token", "learned tokens")
    for step in range(given.steps):
        chosen = data.batch_at(step, count=len(tokens), micro_batch=4, seed=0)
        batch = batches.collate([tokens[index] for index in chosen], torch.device("cpu"))
        loss = completion_loss(live.model, batch.input_ids, batch.labels)  # a sum, and how many tokens it is over
        optimizer.zero_grad()
        torch.autograd.backward(loss.total / loss.tokens)
        optimizer.step()
        table.add_row(str(step + 1), f"{float(loss.total.detach()) / loss.tokens:.3f}", str(loss.tokens))
    console.print(table)


if __name__ == "__main__":
    try:
        main()
    except EdgeRuntimeError as error:
        raise SystemExit(str(error)) from None
