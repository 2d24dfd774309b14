"""Token accuracy: that of the whole logits, whatever the chunks, and nothing that training or the loss would see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from edge_runtime.train import loss  # noqa: E402 - after the check that torch is there
from edge_runtime.train.data import IGNORED, Tokenised  # noqa: E402 - as above
from edge_runtime.train.evaluating import evaluate  # noqa: E402 - as above
from edge_runtime.train.live import LiveModel, attach, load_adapter  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def live(tiny_base: Path) -> LiveModel:
    made = attach(tiny.plain_model(tiny_base), tiny.MIXED, scaling=2.0)
    load_adapter(made, tiny.random_adapter(tiny.MIXED))
    return made


def said_by(live: LiveModel, example: Tokenised) -> Any:
    """What the model holds most likely after each token, by the whole logits of transformers."""
    live.model.eval()
    with torch.no_grad():
        return live.model(torch.tensor([example.input_ids])).logits[0].argmax(dim=-1)


def half_right(live: LiveModel) -> list[Tokenised]:
    """Examples of which every second label is what the model would say, and the others are not."""
    found = []
    for example in tiny.examples(6):
        said = said_by(live, example).tolist()
        labels = [IGNORED] + [
            token if place % 2 else (token + 1) % live.model.config.vocab_size for place, token in enumerate(said[:-1])
        ]
        found.append(Tokenised(example.input_ids, tuple(labels)))
    return found


@pytest.mark.parametrize("batch", [1, 4])
def test_tokens_are_right_that_the_whole_logits_say(live: LiveModel, batch: int) -> None:
    examples = half_right(live)
    found = evaluate(live, examples, batch=batch, count_right=True)
    right = sum((len(example.input_ids) - 1) // 2 for example in examples)
    assert (found.right, found.tokens) == (right, sum(len(example.input_ids) - 1 for example in examples))
    assert found.accuracy == right / found.tokens


def test_counting_changes_no_loss_and_is_not_done_unasked(live: LiveModel) -> None:
    examples = tiny.examples(5)
    asked, unasked = evaluate(live, examples, count_right=True), evaluate(live, examples)
    assert asked.loss == unasked.loss
    assert unasked.right is None
    assert unasked.accuracy is None


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_count_the_same(live: LiveModel, chunk: int) -> None:
    example = half_right(live)[0]
    found = loss.labelled(live.model, torch.tensor([example.input_ids]), torch.tensor([example.labels]))
    assert loss.right_tokens(found, chunk=chunk) == (len(example.input_ids) - 1) // 2
