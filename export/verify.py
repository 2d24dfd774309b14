"""Does the artefact compute what the live model computes? Both answer the same prompts, one after the other.

A small device has no room for two models. So the live model goes first: its logits and its greedy tokens are kept, the
logits on disk, and the model is let go before the artefact is opened in its own engine.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from edge_runtime.train import generate, heap, mixed
from edge_runtime.train.live import LiveModel
from export.attached import attached, fresh_base
from export.checks import base_of
from export.float32 import in_float32
from export.parity import Parity, distance, log_softmax, same_choices
from export.subject import Engine, Logits, Subject

PROMPTS = (
    "The capital of France is",
    'def mean(values):\n    """Return the arithmetic mean of',
    "Write one sentence about the sea.",
)
"""Texts to compare on where a caller has none of its own."""

ANSWER_TOKENS = 16
"""Greedy tokens after each prompt."""
PROMPT_TOKENS = 48
"""Of a longer prompt, this many are compared."""
MOST_PROMPTS = 8
PROBED = 8
"""Positions at which an engine without logits is asked for the probabilities of all tokens."""


@dataclass(frozen=True, eq=False)
class Reference:
    """What the live model says, kept so that it need not be in memory any more.

    Attributes:
        prompts: token ids of each.
        answers: the greedy tokens after each.
        live: the logits of each, after every token of prompt and answer, computed in float32; on disk.
        effect: the largest change that the adapter makes to one of them.
    """

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    live: tuple[Logits, ...]
    effect: float

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """Prompt and answer together."""
        return tuple((*prompt, *answer) for prompt, answer in zip(self.prompts, self.answers, strict=True))


def tokenizer_of(subject: Subject) -> Any:
    """The base's tokenizer.

    Raises:
        ExportError: the subject has no base with it.
    """
    return AutoTokenizer.from_pretrained(base_of(subject).folder, local_files_only=True)


def encode(tokenizer: Any, texts: Sequence[str] = PROMPTS) -> tuple[tuple[int, ...], ...]:
    """The beginnings of texts as token ids, without the special tokens that some tokenizers add."""
    rows = (tokenizer.encode(text, add_special_tokens=False)[:PROMPT_TOKENS] for text in texts[:MOST_PROMPTS])
    return tuple(tuple(row) for row in rows if row)


def logits(model: Any, prompts: Sequence[Sequence[int]]) -> Logits:
    """The logits after every token of every prompt, each prompt alone.

    Args:
        model: a causal language model of transformers; its mode is left as it was.
        prompts: token ids.

    Returns:
        (tokens of all prompts, vocabulary), float32, in the precision that the model computes in.
    """
    device = model.get_input_embeddings().weight.device
    with generate.answering(model) as causal:
        found = [causal(input_ids=torch.tensor([list(prompt)], device=device)).logits[0] for prompt in prompts]
    rows: Logits = torch.cat(found).float().cpu().numpy()
    return rows


def reference_of(
    live: LiveModel, prompts: Sequence[Sequence[int]], scratch: Path, *, count: int = ANSWER_TOKENS
) -> Reference:
    """What a live model says to prompts, in float32 whatever precision it trains in, all its directions at once.

    Args:
        live: the adapter in its base; left as it was.
        prompts: token ids of each.
        scratch: an existing folder for the logits, which must stay while the reference is used.
        count: greedy tokens after each prompt.

    Raises:
        RoundError: the model's logits are not numbers.
        DataError: a prompt that leaves no position for the answer.
    """
    rows = tuple(tuple(prompt) for prompt in prompts)
    kept, effect = [], 0.0
    with in_float32(live.model), mixed.at_once(live):
        answers = tuple(generate.generate(live.model, rows, stop=(), max_new_tokens=count))
        for index, (prompt, answer) in enumerate(zip(rows, answers, strict=True)):
            row = [(*prompt, *answer)]
            found = logits(live.model, row)
            with mixed.without_adapter(live):
                effect = max(effect, float(np.max(np.abs(found - logits(live.model, row)))))
            file = scratch / f"live-{index}.npy"
            np.save(file, found)
            kept.append(np.load(file, mmap_mode="r"))
    return Reference(rows, answers, tuple(kept), effect)


def reference(
    subject: Subject, prompts: Sequence[Sequence[int]], scratch: Path, *, count: int = ANSWER_TOKENS
) -> Reference:
    """The same of an adapter that is in no model yet: it is put into its base, and the base is let go afterwards.

    Raises:
        BaseModelError: the base cannot be loaded, or the adapter belongs to another.
        ExportError: the subject has no base with it.
    """
    live = attached(fresh_base(base_of(subject)), subject.adapter, scaling=subject.scaling)
    try:
        return reference_of(live, prompts, scratch, count=count)
    finally:
        del live
        gc.collect()
        heap.release()


def judge(known: Reference, engine: Engine) -> Parity:
    """Compare an open artefact with what the live model said.

    An engine that has no logits has `log_probabilities` (tokens, vocabulary). Each position is a request to it, so few
    are compared.

    Raises:
        ExportError: nothing to compare, logits of another shape, or numbers that are not finite.
    """
    ask = getattr(engine, "log_probabilities", None)
    pairs = _logits(known, engine) if ask is None else _probabilities(known, ask)
    found = distance(pairs)
    total = sum(map(len, known.answers))
    same = sum(map(lambda prompt, answer: same_choices(engine.greedy, prompt, answer), known.prompts, known.answers))
    return Parity(found, same / total if total else 1.0, total, known.effect, of_logits=ask is None)


def _logits(known: Reference, engine: Engine) -> Iterator[tuple[Logits, Logits]]:
    for live, row in zip(known.live, known.rows, strict=True):
        yield live, engine.logits(row)


def _probabilities(known: Reference, ask: Callable[[Sequence[int], int], Logits]) -> Iterator[tuple[Logits, Logits]]:
    """Logarithms of probabilities at the first positions of the first prompt, of both."""
    row = known.prompts[0][:PROBED]
    live = np.stack([log_softmax(logits) for logits in known.live[0][: len(row)]]).astype(np.float32)
    said = ask(row, live.shape[1])
    # Of tokens that an engine does not name, it says only that they are less likely than all others.
    yield live, np.where(np.isfinite(said), said, live)
