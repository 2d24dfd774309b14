"""Label tasks without generation: how likely each candidate label is as the whole answer.

Nothing needs to be parsed and nothing can be said beside the labels: for a task with a fixed set of answers this is the
exact choice of the model. A prompt passes through the model once, whatever the number of labels; each label is then
scored behind its cached keys and values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from edge_runtime.errors import DataError, missing_extra
from edge_runtime.train import heap
from edge_runtime.train.data import Example, Message
from edge_runtime.train.generate import answering, batches_by_length, left_padded, positions_of, prompt_and_answer

try:
    import torch
    from torch.nn import functional
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "torch", "client") from missing

Tokens = tuple[int, ...]


def labels_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """The distinct answers of examples, sorted: the label set of a label task.

    Raises:
        DataError: an example without turns.
    """
    for example in examples:
        if not example.messages:
            raise DataError(f"expected a conversation with a label as answer, found the text '{example.text[:40]}'")
    return tuple(sorted({example.messages[-1].content for example in examples}))


def label_losses(
    model: Any, tokenizer: Any, examples: Sequence[Example], labels: Sequence[str], *, batch_size: int = 16
) -> list[tuple[float, ...]]:
    """The loss of each label as the answer to each example: its summed cross-entropy, end-of-sequence token included.

    The smallest is the likeliest answer. It is the completion loss that training would see for that answer.

    Args:
        model: a causal language model of transformers, adapted or not; its mode is left as it was found.
        tokenizer: of the base.
        examples: conversations; what the assistant says last is replaced by each label in turn.
        labels: at least two that differ.
        batch_size: pairs of a prompt and a label that are scored side by side.

    Returns:
        For each example, the loss of each label in nats, in the order of `labels`.

    Raises:
        DataError: fewer than two labels, or an example without turns.
    """
    if len(set(labels)) < 2:
        raise DataError(f"expected at least 2 labels to choose among, found {len(set(labels))}; give more examples")
    pairs = [[prompt_and_answer(_answered(example, label), tokenizer) for label in labels] for example in examples]
    prompts = [candidates[0][0] for candidates in pairs]
    side_by_side = min(len(labels), batch_size)
    losses: dict[int, tuple[float, ...]] = {}
    with answering(model) as causal:
        for batch in batches_by_length(prompts, max(batch_size // side_by_side, 1)):
            answers = [[answer for _, answer in pairs[index]] for index in batch]
            found = _of_batch(causal, [prompts[index] for index in batch], answers, side_by_side)
            losses.update(zip(batch, found, strict=True))
            heap.release()
    return [losses[index] for index in range(len(examples))]


def likeliest_labels(
    model: Any, tokenizer: Any, examples: Sequence[Example], labels: Sequence[str], *, batch_size: int = 16
) -> list[str]:
    """For each example the label with the smallest `label_losses`; the first of equal ones."""
    losses = label_losses(model, tokenizer, examples, labels, batch_size=batch_size)
    return [labels[min(range(len(labels)), key=row.__getitem__)] for row in losses]


def likelihood_accuracy(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    labels: Sequence[str] | None = None,
    *,
    batch_size: int = 16,
) -> float:
    """Share of the examples whose own answer is the likeliest of all labels.

    Args:
        model: as in `label_losses`.
        tokenizer: of the base.
        examples: conversations that end with the right label.
        labels: the label set; the distinct answers of `examples` when absent.
        batch_size: as in `label_losses`.

    Raises:
        DataError: no example, fewer than two labels, or an answer that is none of the labels.
    """
    if not examples:
        raise DataError("expected at least one example to judge, found none; give examples to evaluate on")
    known = labels_of(examples) if labels is None else tuple(labels)
    unknown = set(labels_of(examples)) - set(known)
    if unknown:
        raise DataError(f"expected answers among {', '.join(known)}; found '{min(unknown)}'; name all labels")
    chosen = likeliest_labels(model, tokenizer, examples, known, batch_size=batch_size)
    right = [found == example.messages[-1].content for found, example in zip(chosen, examples, strict=True)]
    return math.fsum(right) / len(right)


def _answered(example: Example, label: str) -> Example:
    return replace(example, messages=(*example.messages[:-1], Message("assistant", label)))


def _of_batch(
    causal: Any, prompts: Sequence[Tokens], answers: Sequence[Sequence[Tokens]], side_by_side: int
) -> list[tuple[float, ...]]:
    """Losses of all labels for a few prompts: one pass for the prompts, then one for each handful of labels."""
    batch = left_padded(prompts, causal.get_input_embeddings().weight.device)
    output = causal(
        input_ids=batch.input_ids,
        attention_mask=batch.mask,
        position_ids=positions_of(batch.mask),
        use_cache=True,
        logits_to_keep=1,
    )
    columns: list[torch.Tensor] = []
    for first in range(0, len(answers[0]), side_by_side):
        some = [row[first : first + side_by_side] for row in answers]
        cache = copy.deepcopy(output.past_key_values)  # scoring appends to it
        columns.append(_behind(causal, batch.mask, cache, output.logits[:, -1], some))
    return [tuple(row) for row in torch.cat(columns, dim=1).tolist()]


def _behind(
    causal: Any, mask: torch.Tensor, cache: Any, first_logits: torch.Tensor, answers: Sequence[Sequence[Tokens]]
) -> torch.Tensor:
    """Summed losses (prompts, labels) of answers behind cached prompts.

    Args:
        causal: the model.
        mask: (prompts, length) of the prompts.
        cache: their keys and values; changed.
        first_logits: (prompts, vocabulary), what follows each prompt.
        answers: for each prompt the same number of token rows.
    """
    count = len(answers[0])
    rows = [answer for row in answers for answer in row]
    longest = max(map(len, rows))
    # Padded on the right, where no token of an answer looks.
    tokens = torch.tensor([[*row, *(0,) * (longest - len(row))] for row in rows], device=mask.device)
    real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=mask.device)
    logits = first_logits.repeat_interleave(count, dim=0)[:, None]
    if longest > 1:
        cache.batch_repeat_interleave(count)
        seen = torch.cat([mask.repeat_interleave(count, dim=0), real[:, :-1]], dim=1)
        output = causal(
            input_ids=tokens[:, :-1],
            attention_mask=seen,
            position_ids=positions_of(seen)[:, -(longest - 1) :],
            past_key_values=cache,
            use_cache=True,
        )
        logits = torch.cat([logits, output.logits], dim=1)
    each = functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none")
    return (each.view_as(tokens) * real).sum(dim=1).view(len(answers), count)
