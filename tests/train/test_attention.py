"""Packed attention: each example attends to itself alone, forward and backward, as torch's attention does."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402 - after the check that torch is there
from hypothesis import strategies as st  # noqa: E402 - as above

from edge_runtime.train import attention  # noqa: E402 - as above
from edge_runtime.train.attention import packed_attention  # noqa: E402 - as above

pytestmark = pytest.mark.torch

WIDTH = 8


def drawn(heads: int, tokens: int) -> Any:
    return torch.randn(heads, tokens, WIDTH, requires_grad=True)


def alone(q: Any, k: Any, v: Any, lengths: list[int], scale: float) -> Any:
    """Each example by torch's attention, with a copy of the key heads for every query head."""
    shared = q.shape[0] // k.shape[0]
    parts, start = [], 0
    for length in lengths:
        of = slice(start, start + length)
        keys, values = (x[:, of].repeat_interleave(shared, 0)[None] for x in (k, v))
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(q[None, :, of], keys, values, is_causal=True, scale=scale)[
                0
            ]
        )
        start += length
    return torch.cat(parts, 1)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    groups=st.sampled_from([(1, 1), (4, 4), (6, 2), (3, 1)]),
    block=st.sampled_from([1, 3, 8, 128]),
)
def test_every_example_is_computed_as_if_it_were_alone(lengths: list[int], groups: tuple[int, int], block: int) -> None:
    torch.manual_seed(sum(lengths))
    q, k, v = drawn(groups[0], sum(lengths)), drawn(groups[1], sum(lengths)), drawn(groups[1], sum(lengths))
    weights = torch.randn_like(q)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERIES", block)
        ours = packed_attention(q, k, v, lengths, 0.3)
        ours_gradients = torch.autograd.grad((ours * weights).sum(), (q, k, v))
    theirs = alone(q, k, v, lengths, 0.3)

    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for one, other in zip(ours_gradients, torch.autograd.grad((theirs * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any),
    groups=st.sampled_from([(1, 1), (4, 4), (6, 2), (3, 1)]),
)
def test_where_torchs_kernels_are_used_every_example_is_alone_too(lengths: list[int], groups: tuple[int, int]) -> None:
    """Here the CPU stands for a GPU."""
    torch.manual_seed(sum(lengths))
    q, k, v = drawn(groups[0], sum(lengths)), drawn(groups[1], sum(lengths)), drawn(groups[1], sum(lengths))
    weights = torch.randn_like(q)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "WRITTEN_OUT", frozenset())
        ours = packed_attention(q, k, v, lengths, 0.3)
    ours_gradients = torch.autograd.grad((ours * weights).sum(), (q, k, v))
    theirs = alone(q, k, v, lengths, 0.3)

    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for one, other in zip(ours_gradients, torch.autograd.grad((theirs * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@given(lengths=st.lists(st.integers(1, 600), min_size=1, max_size=30))
def test_side_by_side_less_than_twice_the_tokens_are_computed_in_a_call_for_each_doubling(lengths: list[int]) -> None:
    places, back = attention._arranged(tuple(lengths), torch.device("cpu"))
    shown = torch.cat([place.flatten() for place in places])

    assert torch.equal(shown[back], torch.arange(sum(lengths)))
    assert shown.numel() < 2 * sum(lengths)
    assert len(places) <= max(lengths).bit_length() + 1


def test_gradients_in_bfloat16_point_where_those_of_float32_do() -> None:
    torch.manual_seed(0)
    q, k, v = (drawn(heads, 60) for heads in (6, 2, 2))
    weights = torch.randn(6, 60, WIDTH)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        out = packed_attention(q.to(dtype), k.to(dtype), v.to(dtype), (25, 35), 0.3)
        found.append(torch.autograd.grad((out * weights.to(dtype)).sum(), (q, k, v)))

    for exact, rounded in zip(*found, strict=True):
        assert torch.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.999


def test_no_probabilities_are_kept() -> None:
    q, k, v = drawn(6, 50), drawn(2, 50), drawn(2, 50)
    kept: list[int] = []

    def keep(tensor: Any) -> Any:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed_attention(q, k, v, (50,), 0.3)

    assert sorted(kept) == sorted([q.numel(), k.numel(), v.numel()])


def test_lengths_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to 10"):
        packed_attention(drawn(2, 10), drawn(2, 10), drawn(2, 10), (4, 5), 1.0)
