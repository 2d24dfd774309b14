"""Causal attention over several examples in one row: each sees itself alone, and nothing is computed between them.

On a CPU, torch's flash attention is three times slower backward than plain products of this size (measured at 64 to 256
tokens, 9 heads on 3 key heads, bfloat16), and its key heads are copied for every query head. So there it is written
out: the query heads that share a key head are one matrix, blocks of queries look at the keys up to their own end and
no further, and the probabilities are computed again in the backward pass.

On a GPU torch's kernels are used. Many short examples one by one would be many small launches, so examples of similar
length go side by side, padded on the right, where causal attention never looks. `torch.nn.attention.varlen` would save
the padding, but takes half precision on some cards only, and its arguments have changed with each release so far.

Memory: on a CPU, (heads · QUERIES · length) probabilities at a time, whatever the number of tokens; on a GPU, less than
twice the queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

QUERIES = 128
"""Queries whose probabilities exist at once: above it half of what a block computes is masked away."""

WRITTEN_OUT = frozenset({"cpu"})
"""Kinds of devices on which torch's own attention is the slower one."""


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...], scale: float
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        groups = k.shape[0]
        for queries, keys in _blocks(lengths):
            part = q[:, queries].reshape(groups, -1, q.shape[-1])
            chosen = _probabilities(part, k[:, keys], queries.stop - queries.start, scale)
            out[:, queries] = torch.bmm(chosen, v[:, keys]).view(q.shape[0], -1, q.shape[-1])
        ctx.save_for_backward(q, k, v)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        groups = k.shape[0]
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for queries, keys in _blocks(ctx.lengths):
            part = q[:, queries].reshape(groups, -1, q.shape[-1])
            g = gradients[0][:, queries].reshape(groups, -1, q.shape[-1])
            chosen = _probabilities(part, k[:, keys], queries.stop - queries.start, ctx.scale)
            dv[:, keys] += torch.bmm(chosen.transpose(1, 2), g)
            towards = torch.bmm(g, v[:, keys].transpose(1, 2))
            # An operator like others but for its name; written out it would round twice more.
            softened = torch.ops.aten._softmax_backward_data  # noqa: SLF001 - as said
            logits = softened(towards, chosen, -1, chosen.dtype).mul_(ctx.scale)
            dq[:, queries] = torch.bmm(logits, k[:, keys]).view(q.shape[0], -1, q.shape[-1])
            dk[:, keys] += torch.bmm(logits.transpose(1, 2), part)
        return dq, dk, dv, None, None


def _blocks(lengths: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """(queries, the keys that any of them sees), example by example."""
    start = 0
    for length in lengths:
        for first in range(start, start + length, QUERIES):
            last = min(first + QUERIES, start + length)
            yield slice(first, last), slice(start, last)
        start += length


def _probabilities(q: torch.Tensor, k: torch.Tensor, queries: int, scale: float) -> torch.Tensor:
    """(groups, heads in a group x queries, keys): each query's weights on the keys up to its own."""
    count = k.shape[1]
    later = torch.full((queries, count), float("-inf"), dtype=q.dtype, device=q.device).triu_(count - queries + 1)
    mask = later.repeat(q.shape[1] // queries, 1)
    return torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(-1)


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], scale: float
) -> torch.Tensor:
    """Causal attention within each example of a row.

    Args:
        q: (heads, tokens, d).
        k: (key heads, tokens, d); heads is a multiple of key heads, and heads that follow each other share one.
        v: as k.
        lengths: tokens of each example, in their order; they add up to `tokens`.
        scale: of the logits.

    Returns:
        (heads, tokens, d).

    Raises:
        ValueError: lengths that do not add up.
    """
    if sum(lengths) != q.shape[1]:
        raise ValueError(f"expected lengths that add up to {q.shape[1]} tokens; found {sum(lengths)}")
    if q.device.type in WRITTEN_OUT:
        out: torch.Tensor = _Attention.apply(q, k, v, tuple(lengths), scale)  # type: ignore[no-untyped-call]
        return out
    shared = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(shared, dim=0) for x in (k, v))
    if len(lengths) == 1:
        return _by_torch(q[None], k[None], v[None], scale)[0]
    return _side_by_side(q, k, v, tuple(lengths), scale)


def _by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def _side_by_side(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...], scale: float
) -> torch.Tensor:
    places, back = _arranged(lengths, q.device)
    mixed = []
    for place in places:
        rows = [
            x.index_select(1, place.flatten()).view(-1, *place.shape, x.shape[2]).transpose(0, 1) for x in (q, k, v)
        ]
        mixed.append(_by_torch(rows[0], rows[1], rows[2], scale).transpose(0, 1).flatten(1, 2))
    return torch.cat(mixed, 1).index_select(1, back)


# Of a few rows: every layer asks for the same one, and again in the backward pass of a checkpointed layer.
@lru_cache(maxsize=4)
def _arranged(lengths: tuple[int, ...], device: torch.device) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Examples in groups whose lengths differ by less than a factor of two, and the way back.

    Returns:
        For each group (examples, longest of them), int64: the place in the row of each token, and of the example's last
        token where it has no more. And (tokens,), int64: where each token of the row is among all groups, flattened.
    """
    starts = [0, *accumulate(lengths)]
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        if length:
            groups.setdefault((length - 1).bit_length(), []).append(index)
    places, back, before = [], torch.empty(starts[-1], dtype=torch.int64), 0
    for members in groups.values():
        longest = max(lengths[index] for index in members)
        steps, first = torch.arange(longest), torch.tensor([starts[index] for index in members])
        length_of = torch.tensor([lengths[index] for index in members])[:, None]
        place = first[:, None] + torch.minimum(steps, length_of - 1)
        real = (steps < length_of).flatten()
        back[place.flatten()[real]] = before + real.nonzero().flatten()
        before += place.numel()
        places.append(place.to(device))
    return tuple(places), back.to(device)
