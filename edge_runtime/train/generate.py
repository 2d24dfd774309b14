"""Answers of a live model: batched greedy generation for prompts of unequal length.

Prompts are sorted by length, padded on the left and decoded with a key/value cache; an answer that has ended leaves
its batch, so that nothing is computed for it any more. Greedy decoding draws nothing at random: the same model and
prompts give the same answers, in float32 whatever the batch; in bfloat16, where logits often tie, another batch size
may round another way.

`transformers` can generate too, but takes what is not said from the model's own generation settings, sampling and
repetition penalties among them, and computes every row of a batch until the last has ended.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from edge_runtime.errors import DataError, RoundError, missing_extra
from edge_runtime.train import heap, metrics
from edge_runtime.train.data import IGNORED, Example, tokenise
from edge_runtime.train.loss import unwrap

try:
    import torch
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "torch", "client") from missing

_PADDING_TOKEN = 0  # any will do: the attention mask hides it


@dataclass(frozen=True)
class Decoding:
    """How answers are made.

    Attributes:
        max_new_tokens: tokens of an answer, at most.
        batch_size: prompts that are decoded side by side; it changes memory and speed, not the answers.
        max_prompt_tokens: tokens of a prompt, at most: longer ones lose their beginning. None for as many as the
            model's positions leave beside the answer.
    """

    max_new_tokens: int = 64
    batch_size: int = 8
    max_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"decoding needs {name} of at least 1; found {getattr(self, name)}")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ValueError(f"decoding needs max_prompt_tokens of at least 1, or None; found {self.max_prompt_tokens}")


@dataclass(frozen=True, eq=False)
class Prompts:
    """Token rows side by side, padded on the left, so that all of them end in the same column.

    Attributes:
        input_ids: (prompts, length), int64.
        mask: (prompts, length), int64; 1 where a token is real.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> Prompts:
    """Token rows as a batch, as long as the longest of them."""
    length = max(map(len, rows))
    input_ids = torch.full((len(rows), length), _PADDING_TOKEN, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        input_ids[index, length - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask[index, length - len(row) :] = 1
    return Prompts(input_ids.to(device), mask.to(device))


def batches_by_length(rows: Sequence[Sequence[object]], size: int) -> Iterator[tuple[int, ...]]:
    """Indices of rows in batches of similar length, the longest first: what fits at first fits to the end."""
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index]), index))
    for first in range(0, len(order), size):
        yield tuple(order[first : first + size])


@contextmanager
def answering(model: Any) -> Iterator[Any]:
    """Evaluation mode without gradients, as long as the context lasts; yields the causal language model itself."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield unwrap(model)
    finally:
        model.train(was_training)


def prompt_and_answer(example: Example, tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids before the assistant's last turn, and of that turn with its end-of-sequence token.

    Raises:
        DataError: a plain text, which has no turns, or a prompt without a token.
    """
    if not example.messages:
        raise DataError(f"expected a conversation to answer, found the plain text '{example.text[:40]}'; give prompts")
    whole = tokenise(example, tokenizer, sys.maxsize)
    start = len(whole.labels)
    while start and whole.labels[start - 1] != IGNORED:
        start -= 1
    if not start:
        raise DataError("expected a prompt before the answer, found none; the chat template or the prompt is empty")
    return whole.input_ids[:start], whole.input_ids[start:]


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's end of sequence, and those of the model's generation settings."""
    settings = getattr(unwrap(model), "generation_config", None)
    of_model = getattr(settings, "eos_token_id", None)
    found = of_model if isinstance(of_model, (list, tuple)) else [of_model]
    return frozenset(int(token) for token in (*found, tokenizer.eos_token_id) if token is not None)


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Collection[int],
    max_new_tokens: int,
    batch_size: int = 8,
) -> list[tuple[int, ...]]:
    """The greedy continuation of each prompt, in the order of the prompts.

    Args:
        model: a causal language model of transformers, adapted or not, quantised or not. Its mode is left as it was
            found, and no setting of it is changed.
        prompts: token ids of each, at least one.
        stop: tokens that end an answer; they are not part of what is returned.
        max_new_tokens: tokens of an answer, at most.
        batch_size: prompts decoded side by side.

    Returns:
        New token ids, for each prompt.

    Raises:
        DataError: a prompt without a token, or longer than the model's positions leave room for.
        RoundError: the model's logits are not numbers.
    """
    limit = _room(unwrap(model)) - max_new_tokens
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= limit:
            raise DataError(
                f"expected prompts of 1 to {limit} tokens, so that {max_new_tokens} more have a position; found "
                f"{len(prompt)} in prompt {index + 1}; shorten it, or lower max_new_tokens"
            )
    answers: dict[int, tuple[int, ...]] = {}
    with answering(model) as causal:
        for batch in batches_by_length(prompts, batch_size):
            found = _greedy(causal, [prompts[index] for index in batch], frozenset(stop), max_new_tokens)
            answers.update(zip(batch, found, strict=True))
            heap.release()
    return [answers[index] for index in range(len(prompts))]


def _room(causal: Any) -> int:
    return getattr(causal.config, "max_position_embeddings", None) or sys.maxsize


def _greedy(
    causal: Any, prompts: Sequence[Sequence[int]], stop: frozenset[int], max_new_tokens: int
) -> list[tuple[int, ...]]:
    """Answers of one batch."""
    device = causal.get_input_embeddings().weight.device
    batch = left_padded(prompts, device)
    ids, mask, cache = batch.input_ids, batch.mask, None
    answers: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))  # the answer that each row of the tensors belongs to
    for _ in range(max_new_tokens):
        output = causal(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions_of(mask)[:, -ids.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        chosen = _likeliest(output.logits[:, -1])
        rows = [row for row, token in enumerate(chosen.tolist()) if token not in stop]
        for row in rows:
            answers[active[row]].append(int(chosen[row]))
        if not rows:
            break
        if len(rows) < len(active):
            kept = torch.tensor(rows, device=device)
            cache.batch_select_indices(kept)
            chosen, mask, active = chosen[kept], mask[kept], [active[row] for row in rows]
        ids, mask = chosen[:, None], torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    return [tuple(answer) for answer in answers]


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Position of each token in its row, from 0 at the first real one: (rows, length), int64."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def _likeliest(logits: torch.Tensor) -> torch.Tensor:
    best, chosen = logits.max(dim=-1)
    if bool(best.isnan().any()):
        raise RoundError("expected logits that are numbers, found NaN; the adapter or the base has diverged")
    return chosen


def predict(model: Any, tokenizer: Any, examples: Sequence[Example], decoding: Decoding | None = None) -> list[str]:
    """What the model says in place of the assistant's last turn of each example, without white space around it.

    Args:
        model: as in `generate`.
        tokenizer: of the base.
        examples: conversations that end with the assistant; that last turn is not shown to the model.
        decoding: how answers are made; the defaults of `Decoding` when absent.

    Raises:
        DataError: an example without turns, or positions too few for any prompt.
        RoundError: the model's logits are not numbers.
    """
    how = decoding or Decoding()
    left = max(_room(unwrap(model)) - how.max_new_tokens, 0)
    longest = left if how.max_prompt_tokens is None else min(how.max_prompt_tokens, left)
    prompts = [prompt_and_answer(example, tokenizer)[0] for example in examples]
    found = generate(
        model,
        [prompt[max(len(prompt) - longest, 0) :] for prompt in prompts],
        stop=stop_tokens(model, tokenizer),
        max_new_tokens=how.max_new_tokens,
        batch_size=how.batch_size,
    )
    return [str(tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in found]


def task_metrics(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    names: Sequence[str] = tuple(metrics.METRICS),
    decoding: Decoding | None = None,
) -> dict[str, float]:
    """Metrics of the model's answers against the assistant's last turns, by name; all of them share one generation.

    Args:
        model: as in `generate`.
        tokenizer: of the base.
        examples: conversations that end with the assistant's reference answer.
        names: keys of `metrics.METRICS`.
        decoding: as in `predict`.

    Raises:
        ConfigError: a name that METRICS does not have.
        DataError: no example, or one without turns.
        RoundError: the model's logits are not numbers.
    """
    for name in names:
        metrics.get(name)  # before the expensive part
    answers = predict(model, tokenizer, examples, decoding)
    return dict(metrics.score_all(names, answers, [example.messages[-1].content for example in examples]))
