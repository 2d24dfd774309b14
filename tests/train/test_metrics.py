"""Task metrics: laws of the numbers, and what counts as the same answer."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError, DataError
from edge_runtime.train import metrics
from edge_runtime.train.metrics import METRICS

WORDS = st.lists(st.sampled_from(["river", "stone", "light", "moss"]), max_size=9)
TEXTS = st.text(max_size=30)
each_metric = pytest.mark.parametrize("name", sorted(METRICS))


def naive_lcs(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """The definition, word by word."""

    @cache
    def of(i: int, j: int) -> int:
        if i == len(one) or j == len(other):
            return 0
        if one[i] == other[j]:
            return 1 + of(i + 1, j + 1)
        return max(of(i + 1, j), of(i, j + 1))

    return of(0, 0)


@given(WORDS, WORDS)
def test_the_longest_common_subsequence_is_that_of_the_definition(one: list[str], other: list[str]) -> None:
    expected = naive_lcs(tuple(one), tuple(other))

    assert metrics.longest_common_subsequence(one, other) == expected


@given(WORDS, WORDS)
def test_rouge_l_is_the_harmonic_mean_of_precision_and_recall(one: list[str], other: list[str]) -> None:
    common = naive_lcs(tuple(one), tuple(other))
    precision, recall = common / max(len(one), 1), common / max(len(other), 1)
    expected = 2 * precision * recall / (precision + recall) if common else float(one == other)

    assert metrics.rouge_l([" ".join(one)], [" ".join(other)]) == pytest.approx(expected)


def test_rouge_l_gives_the_figures_of_its_paper() -> None:
    """Lin (2004), section 3.1: both candidates share two words in a row, only the first keeps the order of three."""
    reference = "police killed the gunman"

    assert metrics.rouge_l(["police kill the gunman"], [reference]) == pytest.approx(0.75)
    assert metrics.rouge_l(["the gunman kill police"], [reference]) == pytest.approx(0.5)


@each_metric
@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
def test_the_reference_itself_is_a_perfect_answer(name: str, texts: list[str]) -> None:
    assert METRICS[name](texts, texts) == 1.0


@each_metric
@given(pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
def test_a_metric_is_the_mean_over_its_pairs_and_between_0_and_1(name: str, pairs: list[tuple[str, str]]) -> None:
    alone = [METRICS[name]([found], [expected]) for found, expected in pairs]
    together = METRICS[name]([found for found, _ in pairs], [expected for _, expected in pairs])

    assert all(0.0 <= score <= 1.0 for score in alone)
    assert together == pytest.approx(sum(alone) / len(alone))


@each_metric
def test_nothing_to_judge_is_an_error_and_so_is_a_missing_reference(name: str) -> None:
    with pytest.raises(DataError, match="none"):
        METRICS[name]([], [])
    with pytest.raises(ValueError, match="1 and 2"):
        METRICS[name](["one"], ["one", "two"])


@given(TEXTS)
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = metrics.normalise(text)

    assert metrics.normalise(once) == once


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The answer.", "answer"),
        ("  a\tBIG   dog!", "big dog"),
        ("it's", "it s"),
        ("Straße", "STRASSE"),
        ("ﬁne", "fine"),  # a ligature is two letters
    ],
)
def test_case_space_punctuation_and_articles_make_no_difference(one: str, other: str) -> None:
    assert metrics.exact_match([one], [other]) == 1.0


@pytest.mark.parametrize(("one", "other"), [("A", "B"), ("A.", "B."), ("+", "-"), ("", "a"), ("theatre", "atre")])
def test_answers_that_normalisation_could_empty_remain_different(one: str, other: str) -> None:
    assert metrics.exact_match([one], [other]) == 0.0
    assert metrics.exact_match([one], [one]) == 1.0


def test_a_label_is_the_first_line_of_the_answer() -> None:
    answers: Sequence[str] = ["Positive.\nBecause it shines.", "\n negative", "neither", "negative positive"]
    references = ["positive", "negative", "negative", "negative"]

    assert metrics.label_accuracy(answers, references) == 0.5


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    assert metrics.perplexity(0.0) == 1.0
    assert metrics.perplexity(math.log(512)) == pytest.approx(512)
    assert metrics.perplexity(1e6) == math.inf
    assert math.isnan(metrics.perplexity(math.nan))


def test_several_metrics_are_asked_for_by_name() -> None:
    found = metrics.score_all(["rouge_l", "exact_match"], ["the moss"], ["moss"])

    assert list(found) == ["rouge_l", "exact_match"]
    assert found["exact_match"] == 1.0
    assert found["rouge_l"] == pytest.approx(2 / 3)


def test_an_unknown_metric_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="exact_match, label_accuracy, rouge_l"):
        metrics.get("bleu")


def test_metrics_need_no_torch() -> None:
    code = "import sys, edge_runtime.train.metrics; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
