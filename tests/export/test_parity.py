"""The comparison of numbers: what it reports, against the definition in float64, and what it cannot be fooled by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from edge_runtime.errors import ExportError
from export.parity import distance, log_softmax, same_choices

ROWS = arrays(np.float32, (3, 5), elements=st.floats(-30, 30, width=32))
TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=12)


def naive_kl(live: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Mean over positions of the sum of p log(p / q)."""
    p, q = (np.exp(rows.astype(np.float64)) for rows in (live, found))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    return float((p * np.log(p / q)).sum(1).mean())


@given(ROWS, ROWS)
def test_distance_is_its_definition(live: NDArray[np.float32], found: NDArray[np.float32]) -> None:
    made = distance([(live, found)])

    assert made.max_logit_diff == np.abs(live - found).max()
    assert made.same_top == np.mean(live.argmax(1) == found.argmax(1))
    assert made.kl == pytest.approx(naive_kl(live, found), rel=1e-6, abs=1e-9)
    assert made.positions == 3


@given(ROWS, ROWS)
def test_prompts_one_by_one_are_as_all_of_them_together(live: NDArray[np.float32], found: NDArray[np.float32]) -> None:
    together, apart = distance([(live, found)]), distance([(live[:1], found[:1]), (live[1:], found[1:])])

    assert together.kl == pytest.approx(apart.kl, rel=1e-9, abs=1e-12)
    assert (together.max_logit_diff, together.same_top) == (apart.max_logit_diff, apart.same_top)


@given(ROWS, st.floats(-5, 5))
def test_a_constant_on_all_logits_changes_no_probability(live: NDArray[np.float32], more: float) -> None:
    np.testing.assert_allclose(log_softmax(live[0] + np.float32(more)), log_softmax(live[0]), atol=1e-4)
    assert np.exp(log_softmax(live[0])).sum() == pytest.approx(1.0)


def test_logits_that_cannot_be_compared_are_an_error() -> None:
    good = np.zeros((2, 3), np.float32)
    with pytest.raises(ExportError, match="another vocabulary"):
        distance([(good, np.zeros((2, 4), np.float32))])
    with pytest.raises(ExportError, match="finite"):
        distance([(good, np.full((2, 3), np.nan, np.float32))])
    with pytest.raises(ExportError, match="--prompts"):
        distance([])


@given(TOKENS, TOKENS)
def test_each_choice_counts_once_in_the_context_that_both_share(prompt: list[int], expected: list[int]) -> None:
    """An engine that errs at some places is right at all others, however it would have gone on after an error."""

    def wrong(context: Sequence[int]) -> bool:
        return sum(context) % 3 == 0

    def greedy(context: Sequence[int], count: int) -> list[int]:
        known = list(context)
        for _ in range(count):
            at = len(known) - len(prompt)
            right = expected[at] if known[len(prompt) :] == expected[:at] else 9
            known.append(7 if wrong(known) else right)
        return known[len(context) :]

    errors = sum(wrong([*prompt, *expected[:at]]) for at in range(len(expected)))
    assert same_choices(greedy, prompt, expected) == len(expected) - errors


def test_an_engine_that_ends_early_is_asked_again() -> None:
    def short(context: Sequence[int], _count: int) -> list[int]:
        return [len(context)] if len(context) % 2 else []

    assert same_choices(short, (5,), (1, 2, 3)) == 2
