"""The small operations of a decoder layer, each with a backward pass that keeps as little as it can.

Written as modules usually write them, a norm or a gate is a chain of five to eight operations, and autograd keeps what
goes into each, half of it in float32. Here each is one operation that keeps its inputs, which others keep anyway.

Shapes: (…, d) throughout; any floating precision; sums in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        # In this order of roundings, which is that of transformers' modules.
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x.float().mul_(scale) if x.dtype != torch.float32 else x * scale
        g = (gradients[0] * weight).float()
        along = (g * normed).mean(-1, keepdim=True)
        return (g.addcmul(normed, along, value=-1).mul_(scale)).to(x.dtype), None, None


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        g = gradients[0]
        return torch.ops.aten.silu_backward(g * up, gate), functional.silu(gate).mul_(g)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradients[0], cos, -sin), None, None  # a rotation's transpose turns the other way


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.empty_like(x)
    left, right = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return turned


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Weight · x / sqrt(mean(x²) + eps) over the last dimension; the weight is frozen.

    Source: arXiv 1910.07467, equation 4.
    """
    y: torch.Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, element by element. Source: arXiv 2002.05202 (SwiGLU)."""
    y: torch.Tensor = _GatedSilu.apply(gate, up)  # type: ignore[no-untyped-call]
    return y


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: element i of the first half is turned with element i of the second.

    Args:
        x: (tokens, heads, d).
        cos: (tokens, 1, d / 2), of each token's angles.
        sin: the same.

    Source: arXiv 2104.09864, in the half-split layout of GPT-NeoX that transformers uses.
    """
    y: torch.Tensor = _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y
