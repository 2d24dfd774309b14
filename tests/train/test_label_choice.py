"""Label tasks by likelihood: the scores are the completion losses of training, prompt by prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from edge_runtime.errors import DataError  # noqa: E402 - after the check that torch is there
from edge_runtime.train import label_choice  # noqa: E402 - as above
from edge_runtime.train.data import Example, Message, tokenise  # noqa: E402 - as above
from edge_runtime.train.loss import completion_loss  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above

pytestmark = pytest.mark.torch

LABELS = ("positive", "no", "neither of the two, if anything")
PROMPTS = ["def f(x):", "a", "return ' '.join(words) if words else ''", "the text of a longer prompt\nin two lines"]


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    return tiny.plain_model(tiny_base).requires_grad_(False)


@pytest.fixture(scope="module", params=["chat", "plain"])
def tokenizer(tiny_base: Path, request: pytest.FixtureRequest) -> Any:
    found = transformers.AutoTokenizer.from_pretrained(tiny_base)
    if request.param == "plain":
        found.chat_template = None
    return found


def labelled(prompt: str, label: str) -> Example:
    return Example((Message("user", prompt), Message("assistant", label)))


def by_definition(model: Any, tokenizer: Any, prompt: str, label: str) -> float:
    """The loss that training would see, of one example alone."""
    whole = tokenise(labelled(prompt, label), tokenizer, 500)
    with torch.no_grad():
        loss = completion_loss(model.eval(), torch.tensor([whole.input_ids]), torch.tensor([whole.labels]))
    return float(loss.total)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 64])
def test_scores_are_completion_losses_whatever_the_batch(model: Any, tokenizer: Any, batch_size: int) -> None:
    expected = [[by_definition(model, tokenizer, prompt, label) for label in LABELS] for prompt in PROMPTS]
    examples = [labelled(prompt, "no") for prompt in PROMPTS]
    found = label_choice.label_losses(model, tokenizer, examples, LABELS, batch_size=batch_size)

    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-4)


def test_the_likeliest_label_is_right_where_it_is_the_answer(model: Any, tokenizer: Any) -> None:
    likeliest = [min(LABELS, key=lambda label: by_definition(model, tokenizer, prompt, label)) for prompt in PROMPTS]
    right = [labelled(prompt, label) for prompt, label in zip(PROMPTS, likeliest, strict=True)]
    other = next(label for label in LABELS if label != likeliest[0])
    half = [*right[:2], labelled(PROMPTS[2], "unheard"), labelled(PROMPTS[3], "unheard")]

    assert label_choice.likeliest_labels(model, tokenizer, right, LABELS) == likeliest
    assert label_choice.likelihood_accuracy(model, tokenizer, right, LABELS) == 1.0
    assert label_choice.likelihood_accuracy(model, tokenizer, [labelled(PROMPTS[0], other)], LABELS) == 0.0
    with pytest.raises(DataError, match="unheard"):
        label_choice.likelihood_accuracy(model, tokenizer, half, LABELS)


def test_the_model_is_left_in_its_mode(model: Any, tokenizer: Any) -> None:
    model.train()
    label_choice.label_losses(model, tokenizer, [labelled("x", "no")], LABELS)

    assert model.training


def test_labels_are_the_distinct_answers() -> None:
    examples = [labelled("x", "b"), labelled("y", "a"), labelled("z", "b")]

    assert label_choice.labels_of(examples) == ("a", "b")


def test_what_is_no_label_task_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="2 labels"):
        label_choice.likelihood_accuracy(model, tokenizer, [labelled("x", "always")])
    with pytest.raises(DataError, match="none"):
        label_choice.likelihood_accuracy(model, tokenizer, [])
    with pytest.raises(DataError, match="the text"):
        label_choice.labels_of([Example(text="no turns")])
