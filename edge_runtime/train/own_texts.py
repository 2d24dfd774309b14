"""A device's examples in three parts: to train on, to report losses on, and to choose between two adapters by.

Whoever chooses by the very texts on which the chosen one is then reported reports too good a number. So a third of
what is held out, at most as many as are evaluated, chooses and is never reported; and what is reported chooses nothing.
A device that holds out fewer than three examples has none to choose by. All three are the same ones for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edge_runtime.errors import DataError
from edge_runtime.train import data
from edge_runtime.train.token_cache import in_words, tokens_of

SHARE = 3
"""One of so many held-out examples chooses."""


class Parts(NamedTuple):
    """A device's examples, as texts or as tokens."""

    train: Sequence[Any]
    reported: Sequence[Any]
    choosing: Sequence[Any]


def parts_of(examples: Sequence[data.Example], fraction: float, most: int) -> Parts:
    """The three parts.

    Args:
        examples: all that the device has.
        fraction: share of them held out.
        most: held-out examples of either kind, at most.
    """
    train, held_out = data.split(examples, fraction=fraction)
    choosing = min(most, len(held_out) // SHARE)
    reported = held_out[: min(most, len(held_out) - choosing)]
    return Parts(train, reported, held_out[len(held_out) - choosing :])


def tokens_in(
    parts: Parts, tokenizer: data.Tokenizer, max_length: int, *, cache: Path, say: Callable[[str], None], rows: int
) -> Parts:
    """The three parts as tokens; what has no completion within the length is left out.

    Args:
        parts: of texts.
        tokenizer: of the base.
        max_length: tokens of an example, at most.
        cache: where tokens are kept.
        say: told a sentence for people.
        rows: of the base's vocabulary.

    Raises:
        DataError: nothing to learn, or nothing to report, is left.
    """
    found = [
        tokens_of(part, tokenizer, max_length, cache=cache, say=say, vocab_size=rows) if part else None
        for part in parts
    ]
    train, reported, choosing = (() if part is None else part.examples for part in found)
    if not train or not reported:
        raise DataError(
            f"no example has a completion within {max_length} tokens; give shorter examples, "
            "or raise adapter.max_length in the fleet's file"
        )
    for part in found:
        if part is not None and (told := in_words(part, max_length)):
            say(told)
    return Parts(train, reported, choosing)
