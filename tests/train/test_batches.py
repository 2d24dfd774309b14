"""Examples as tensors: what a pack predicts is what its examples predict alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from edge_runtime.train.batches import collate, pack_together  # noqa: E402 - torch may be missing
from edge_runtime.train.data import IGNORED, Tokenised  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above

pytestmark = pytest.mark.torch

laws = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
CPU = torch.device("cpu")
VOCABULARY = 32

TOKENS = st.integers(0, VOCABULARY - 1)


@st.composite
def _tokenised(draw: st.DrawFn) -> Tokenised:
    ids = draw(st.lists(TOKENS, min_size=1, max_size=12))
    learned = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    labels = tuple(token if bears else IGNORED for token, bears in zip(ids, learned, strict=True))
    return Tokenised(tuple(ids), labels)


EXAMPLES = st.lists(_tokenised(), min_size=1, max_size=6)


def summed_loss(logits: Any, labels: Any) -> float:
    """The sum of the losses of a row's tokens, each predicted from the token before it."""
    cross_entropy = torch.nn.functional.cross_entropy
    return float(cross_entropy(logits[0, :-1].double(), labels[0, 1:], ignore_index=IGNORED, reduction="sum"))


@laws
@given(EXAMPLES)
def test_a_pack_holds_its_examples_in_order_and_no_more(examples: list[Tokenised]) -> None:
    packed = pack_together(examples, CPU)

    assert packed.input_ids.shape == packed.labels.shape == packed.position_ids.shape == (1, sum(packed.lengths))
    assert packed.input_ids.dtype == packed.labels.dtype == packed.position_ids.dtype == torch.int64
    pieces = zip(*(values[0].split(list(packed.lengths)) for values in
                   (packed.input_ids, packed.labels, packed.position_ids)), strict=True)  # fmt: skip
    for example, (ids, labels, positions) in zip(examples, pieces, strict=True):
        assert tuple(ids.tolist()) == example.input_ids
        assert positions.tolist() == list(range(len(example.input_ids)))
        assert tuple(labels.tolist()) == (IGNORED, *example.labels[1:])


@laws
@given(EXAMPLES)
def test_no_example_learns_from_its_neighbour(examples: list[Tokenised]) -> None:
    """With a model that sees one token back, the packed loss is the sum of the separate losses."""
    table = torch.nn.functional.one_hot(torch.arange(VOCABULARY) * 7 % VOCABULARY, VOCABULARY).double()

    packed = pack_together(examples, CPU)

    alone = [collate([example], CPU) for example in examples]
    expected = sum(summed_loss(table[one.input_ids], one.labels) for one in alone)
    assert summed_loss(table[packed.input_ids], packed.labels) == pytest.approx(expected, abs=1e-9)
    assert int((packed.labels[0, 1:] != IGNORED).sum()) == sum(example.learned for example in examples)


def test_a_real_model_says_the_same_of_a_pack_as_of_its_examples(tiny_base: Path) -> None:
    """Lengths and positions are all that block-diagonal attention needs."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    examples = tiny.examples(5, seed=3)
    packed = pack_together(examples, CPU)
    block = torch.block_diag(*(torch.ones(length, length) for length in packed.lengths)).bool().tril()
    mask = torch.zeros(block.shape).masked_fill(~block, torch.finfo(torch.float32).min)[None, None]

    with torch.no_grad():
        together = model(packed.input_ids, attention_mask=mask, position_ids=packed.position_ids).logits
        apart = [model(torch.tensor([example.input_ids])).logits for example in examples]

    torch.testing.assert_close(together, torch.cat(apart, dim=1), rtol=1e-4, atol=1e-4)
    expected = sum(summed_loss(logits, torch.tensor([one.labels])) for logits, one in zip(apart, examples, strict=True))
    assert summed_loss(together, packed.labels) == pytest.approx(expected, rel=1e-5)


def test_an_empty_pack_is_refused() -> None:
    for examples in ([], [Tokenised((), ())]):
        with pytest.raises(ValueError, match="at least one example, none of them empty"):
            pack_together(examples, CPU)


def test_padding_stands_on_the_right_and_bears_no_loss() -> None:
    batch = collate([Tokenised((1, 2, 3), (IGNORED, 2, 3)), Tokenised((4, 5), (IGNORED, 5))], CPU)

    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert batch.labels.tolist() == [[IGNORED, 2, 3], [IGNORED, 5, IGNORED]]
