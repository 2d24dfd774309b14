"""How far an exported artefact is from the live model: numbers alone, of logits and of chosen tokens.

An export that loads is not yet an export that is right: a scale lost, a rank matched to the wrong layer or a permuted
row change the answers and raise no error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ExportError
from export.subject import Logits


@dataclass(frozen=True)
class Distance:
    """How far logits are from others at the same positions.

    Attributes:
        max_logit_diff: largest absolute difference of a logit.
        kl: mean Kullback-Leibler divergence of the artefact's next-token distribution from the live one, in nats.
        same_top: share of positions with the same most likely next token.
        positions: positions compared.
    """

    max_logit_diff: float
    kl: float
    same_top: float
    positions: int


@dataclass(frozen=True)
class Parity:
    """What a verification found.

    Attributes:
        distance: of the logits.
        agreement: share of the live model's greedy tokens that the engine, in the same context, chooses as well.
        greedy_tokens: tokens so compared.
        effect: largest absolute change that the adapter makes to a logit: an agreement means little without one.
        of_logits: whether the distance is of logits; else of the logarithms of probabilities, which are logits up to a
            constant.
    """

    distance: Distance
    agreement: float
    greedy_tokens: int
    effect: float
    of_logits: bool = True


def distance(pairs: Iterable[tuple[Logits, Logits]]) -> Distance:
    """Compare the logits of the live model and of the artefact, one prompt after the other.

    Args:
        pairs: for each prompt, both logits: (tokens, vocabulary).

    Raises:
        ExportError: nothing to compare, logits of different shapes, or a number that is not finite.
    """
    largest = divergence = 0.0
    same = positions = 0
    for live, found in pairs:
        if live.shape != found.shape:
            raise ExportError(
                f"expected logits of the live model's shape {live.shape}, found {found.shape}; "
                "the artefact belongs to another base, or has another vocabulary"
            )
        if not (np.isfinite(live).all() and np.isfinite(found).all()):
            raise ExportError("expected finite logits of the live model and the artefact, found some that are not")
        largest = max(largest, float(np.max(np.abs(live - found))))
        divergence += sum(map(_divergence, live, found))
        same += int(np.sum(live.argmax(axis=1) == found.argmax(axis=1)))
        positions += len(live)
    if not positions:
        raise ExportError("expected prompts to verify an export with, found none; give --prompts FILE")
    return Distance(largest, divergence / positions, same / positions, positions)


def same_choices(
    greedy: Callable[[Sequence[int], int], Sequence[int]], prompt: Sequence[int], expected: Sequence[int]
) -> int:
    """How many of the expected tokens an engine chooses, each in the context of the prompt and those before it.

    Where it chooses another token, the engine goes on from the expected one: so one choice counts once, although all
    that follows would differ.

    Args:
        greedy: `Engine.greedy`.
        prompt: token ids.
        expected: what the live model says after it.
    """
    at = same = 0
    while at < len(expected):
        found = greedy((*prompt, *expected[:at]), len(expected) - at)
        alike = _alike(found, expected[at:])
        same, at = same + alike, at + alike + 1
    return same


def _alike(found: Sequence[int], expected: Sequence[int]) -> int:
    """Length of the beginning that two sequences share."""
    length = 0
    for one, other in zip(found, expected, strict=False):
        if one != other:
            break
        length += 1
    return length


def _divergence(live: Logits, found: Logits) -> float:
    """KL(live ‖ found) at one position, in nats; row by row, because a vocabulary in float64 is large."""
    p, q = log_softmax(live), log_softmax(found)
    return float(np.sum(np.exp(p) * (p - q)))


def log_softmax(row: Logits) -> NDArray[np.float64]:
    """The logarithm of each token's probability at one position: (vocabulary,)."""
    shifted = row.astype(np.float64) - float(row.max())
    logarithms: NDArray[np.float64] = shifted - np.log(np.sum(np.exp(shifted)))
    return logarithms
