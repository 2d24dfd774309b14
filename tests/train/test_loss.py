"""The chunked loss: the same numbers and gradients as the whole logits give, of the labelled tokens only."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from torch.nn import functional  # noqa: E402 - after the check that torch is there

from edge_runtime.errors import BaseModelError  # noqa: E402 - as above
from edge_runtime.train import loss  # noqa: E402 - as above
from edge_runtime.train.batches import collate  # noqa: E402 - as above
from edge_runtime.train.data import IGNORED, Tokenised  # noqa: E402 - as above
from edge_runtime.train.loss import chunk_tokens, chunked_cross_entropy, completion_loss  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    return tiny.plain_model(tiny_base).requires_grad_(False)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_loss_and_gradient_equal_those_of_the_whole_logits(chunk: int, biased: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(10, 16, requires_grad=True)
    weight, labels = torch.randn(50, 16), torch.randint(0, 50, (10,))
    bias = torch.randn(50) if biased else None
    expected = functional.cross_entropy(functional.linear(hidden, weight, bias), labels, reduction="sum") / 3
    (gradient,) = torch.autograd.grad(expected, hidden)
    found = chunked_cross_entropy(hidden, weight, labels, bias=bias, chunk=chunk) / 3
    torch.autograd.backward(found)

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(hidden.grad, gradient, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight, labels = torch.randn(9, 6, dtype=torch.float64), torch.randint(0, 9, (4,))

    assert torch.autograd.gradcheck(lambda h: chunked_cross_entropy(h, weight, labels, chunk=3), (hidden,))


def test_bfloat16_states_give_a_float32_loss_close_to_the_exact_one() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 16), torch.randn(50, 16) / 4
    labels = torch.randint(0, 50, (10,))
    expected = functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    found = chunked_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)

    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def test_no_token_at_all_is_a_loss_of_zero_that_can_be_differentiated() -> None:
    hidden = torch.zeros(0, 16, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.randn(50, 16), torch.zeros(0, dtype=torch.int64))
    torch.autograd.backward(loss)

    assert float(loss.detach()) == 0.0
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 16)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A stand-in for Liger's module, by the arguments that its releases 0.5 to 0.8 share; the calls that it got."""
    calls: list[Any] = []

    def fused(hidden: Any, weight: Any, target: Any, bias: Any = None, *, reduction: str = "mean") -> Any:
        calls.append((hidden.dtype, weight.requires_grad))
        return functional.cross_entropy(functional.linear(hidden, weight, bias), target, reduction=reduction)

    module = ModuleType("liger_kernel.transformers.functional")
    vars(module)["liger_fused_linear_cross_entropy"] = fused
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    loss._liger.cache_clear()
    yield calls
    loss._liger.cache_clear()


@pytest.mark.parametrize("biased", [False, True])
def test_liger_is_used_where_it_is_installed_and_takes_the_device(
    liger: list[Any], monkeypatch: pytest.MonkeyPatch, biased: bool
) -> None:
    """Here the CPU stands for CUDA."""
    torch.manual_seed(0)
    hidden = torch.randn(10, 16, dtype=torch.bfloat16, requires_grad=True)
    weight, labels = torch.randn(50, 16), torch.randint(0, 50, (10,))
    bias = torch.randn(50) if biased else None
    ours = chunked_cross_entropy(hidden, weight, labels, bias=bias)
    (expected,) = torch.autograd.grad(ours, hidden)
    assert liger == []

    monkeypatch.setitem(loss.FUSED, "cpu", loss._liger)
    theirs = chunked_cross_entropy(hidden, weight, labels, bias=bias)
    (found,) = torch.autograd.grad(theirs, hidden)

    assert liger == [(torch.float32, False)]
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("tokens", "dtype", "chunk"), [(0, "float32", None), (3, "float64", None), (3, "float32", 2)])
def test_what_liger_cannot_do_is_ours(
    liger: list[Any], monkeypatch: pytest.MonkeyPatch, tokens: int, dtype: str, chunk: int | None
) -> None:
    monkeypatch.setitem(loss.FUSED, "cpu", loss._liger)
    exact = getattr(torch, dtype)
    hidden, labels = torch.zeros(tokens, 16, dtype=exact), torch.zeros(tokens, dtype=torch.int64)
    chunked_cross_entropy(hidden, torch.randn(50, 16, dtype=exact), labels, chunk=chunk)

    assert liger == []


def test_without_liger_the_loss_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    loss._liger.cache_clear()
    monkeypatch.setitem(loss.FUSED, "cpu", loss._liger)
    found = chunked_cross_entropy(torch.zeros(3, 16), torch.zeros(50, 16), torch.zeros(3, dtype=torch.int64))
    loss._liger.cache_clear()

    assert float(found) == pytest.approx(3 * math.log(50))


def test_the_logits_of_the_whole_batch_never_exist() -> None:
    """The largest tensor that the loss makes has the rows of one chunk."""
    hidden, weight = torch.randn(200, 4, requires_grad=True), torch.randn(300, 4)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.backward(chunked_cross_entropy(hidden, weight, torch.zeros(200, dtype=torch.int64), chunk=10))
    largest = max(event.cpu_memory_usage for event in profile.events())

    assert 4 * 10 * 300 <= largest < 2 * 4 * 10 * 300


def test_a_head_that_would_need_a_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="frozen"):
        chunked_cross_entropy(torch.randn(2, 4), torch.randn(5, 4, requires_grad=True), torch.zeros(2).long())


def test_larger_vocabularies_get_smaller_chunks_but_never_none() -> None:
    assert chunk_tokens(50_000) > chunk_tokens(150_000) > 1
    assert chunk_tokens(1 << 40) == 32


def test_the_loss_of_a_batch_is_that_of_transformers_on_each_example_alone(model: Any) -> None:
    """Padding and prompts have no say, and no attention mask is needed for that."""
    batch = tiny.examples(5)
    expected = 0.0
    for example in batch:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        expected += float(model(input_ids=ids, labels=labels).loss) * example.learned
    together = collate(batch, torch.device("cpu"))
    found = completion_loss(model, together.input_ids, together.labels)

    assert found.tokens == sum(example.learned for example in batch)
    assert float(found.total) == pytest.approx(expected, rel=1e-5)


def test_padding_goes_to_the_longest_example_only() -> None:
    batch = collate([Tokenised((1, 2, 3), (IGNORED, 2, 3)), Tokenised((4, 5), (IGNORED, 5))], torch.device("cpu"))

    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert batch.labels.tolist() == [[IGNORED, 2, 3], [IGNORED, 5, IGNORED]]


def test_models_that_transform_their_logits_are_refused(tiny_base: Path) -> None:
    model = tiny.plain_model(tiny_base)
    model.config.final_logit_softcapping = 30.0
    ids = torch.tensor([[1, 2, 3]])

    with pytest.raises(BaseModelError, match="final_logit_softcapping"):
        completion_loss(model, ids, ids)


def test_a_head_that_is_no_plain_linear_layer_is_refused(tiny_base: Path) -> None:
    model = tiny.plain_model(tiny_base)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    ids = torch.tensor([[1, 2, 3]])

    with pytest.raises(BaseModelError, match="Sequential"):
        completion_loss(model, ids, ids)
