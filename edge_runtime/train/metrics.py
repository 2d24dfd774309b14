"""Task metrics: numbers that say how good answers are, from texts alone.

Nothing here imports torch or knows a model: whoever has predictions and references can use it.

Answers are compared after the usual normalisation of question answering: Unicode in one form (NFKC), case folded,
punctuation and symbols removed, the English articles a, an and the removed, whitespace collapsed.

Source: normalisation and exact match are those of SQuAD's evaluation (arXiv:1606.05250); ROUGE-L is the sentence-level
score of Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004), with beta = 1.
Differs from the papers: a step of the normalisation that would leave nothing of an answer is left out, so that "A" and
"B", or "+" and "-", remain different answers; words are runs of Unicode letters, digits and underscores, not stemmed.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence

from edge_runtime.errors import ConfigError, DataError, unknown_name

Metric = Callable[[Sequence[str], Sequence[str]], float]
"""(predictions, references) → mean over the pairs, in [0, 1]."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORD = re.compile(r"\w+")


def normalise(text: str) -> str:
    """The form in which two answers are compared; empty for white space alone."""
    plain = " ".join(_folded(text).split())
    bare = " ".join("".join(" " if _is_mark(letter) else letter for letter in plain).split())
    nouns = " ".join(_ARTICLES.sub(" ", bare).split())
    return nouns or bare or plain


def _folded(text: str) -> str:
    # Twice, for folding the case of a character can leave the normal form.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _is_mark(letter: str) -> bool:
    return unicodedata.category(letter)[0] in "PS"


def label_of(text: str) -> str:
    """The label that a generated answer names: its first line that is not empty, normalised."""
    return normalise(text.strip().partition("\n")[0])


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of the predictions that equal their reference, both normalised.

    Raises:
        DataError: no pair at all.
        ValueError: another number of predictions than of references.
    """
    return _mean(predictions, references, lambda found, expected: float(normalise(found) == normalise(expected)))


def label_accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of the predictions whose first line is the label of their reference, both normalised.

    A model that explains its answer on further lines is right all the same; an answer that is no label is wrong.

    Raises:
        DataError: no pair at all.
        ValueError: another number of predictions than of references.
    """
    return _mean(predictions, references, lambda found, expected: float(label_of(found) == label_of(expected)))


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L: the harmonic mean of precision and recall of the longest common subsequence of words.

    Raises:
        DataError: no pair at all.
        ValueError: another number of predictions than of references.
    """
    return _mean(predictions, references, _rouge_l_of)


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "label_accuracy": label_accuracy,
    "rouge_l": rouge_l,
}


def get(name: str) -> Metric:
    """The metric of that name.

    Raises:
        ConfigError: no metric of that name; lists those there are.
    """
    if name not in METRICS:
        raise ConfigError(unknown_name("metric", name, METRICS))
    return METRICS[name]


def perplexity(loss: float) -> float:
    """Token perplexity of a mean loss in nats per token; infinite where it exceeds what a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest sequence that both contain in order, not necessarily without gaps.

    Cost: O(len(one) · len(other)) time, O(len(other)) memory.
    """
    lengths = [0] * (len(other) + 1)  # of the part of `one` seen so far and each beginning of `other`
    for word in one:
        diagonal = 0
        for column, against in enumerate(other, start=1):
            above = lengths[column]
            lengths[column] = diagonal + 1 if word == against else max(above, lengths[column - 1])
            diagonal = above
    return lengths[-1]


def _words(text: str) -> Sequence[str]:
    folded = _folded(text)
    # An answer of symbols alone ("+", "!=") has no words, and would equal every other such answer.
    return _WORD.findall(folded) or folded.split()


def _rouge_l_of(prediction: str, reference: str) -> float:
    found, expected = _words(prediction), _words(reference)
    if not found or not expected:
        return float(found == expected)
    common = longest_common_subsequence(found, expected)
    return 2 * common / (len(found) + len(expected))  # F1 of common/len(found) and common/len(expected)


def _mean(predictions: Sequence[str], references: Sequence[str], score: Callable[[str, str], float]) -> float:
    if len(predictions) != len(references):
        raise ValueError(f"each prediction needs its reference; found {len(predictions)} and {len(references)}")
    if not predictions:
        raise DataError("expected at least one prediction to judge, found none; give examples to evaluate on")
    return math.fsum(map(score, predictions, references)) / len(predictions)


def score_all(names: Sequence[str], predictions: Sequence[str], references: Sequence[str]) -> Mapping[str, float]:
    """Several metrics of the same answers, by name, in the order asked.

    Raises:
        ConfigError: a name that METRICS does not have.
        DataError: no pair at all.
    """
    return {name: get(name)(predictions, references) for name in names}
