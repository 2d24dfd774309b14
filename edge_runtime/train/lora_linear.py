"""A frozen linear layer with low-rank directions beside it, and a backward pass that keeps nothing but the input.

    y = x Wᵀ + bias + s (x A_hᵀ) B_hᵀ + s (x Aᵀ) Bᵀ

Where a quantised layer has what it lost regained beside it (see `regaining`), W stands for Q(W) and that together. W is
opened from whatever it is kept in, forward and backward, and never kept. (A_h, B_h) are held and frozen; (A, B)
are trained in float32. In the backward pass x Aᵀ is computed again: it costs a thin product, and keeping it would cost
as many numbers per token as the rank. The input is one tensor for all layers that read it (q, k and v; gate and up), so
it is kept once for all of them.

Products are computed in the type that the layer's `product_dtype` names, and in that of the input where it names none:
processors without fast bfloat16 multiply float32 up to twice as fast. What goes between layers, and what is kept for
the backward pass, stays as narrow as the input.

Source of the recomputation: MeSP, arXiv 2602.13069, section 3. Differs from the paper: autograd drives the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from profiles.light_import import light_import

Opened = tuple[torch.Tensor, torch.Tensor | None]
"""A weight (d_out, d_in) in the precision asked for, and what its rows are to be multiplied by, or None for 1."""


def product_dtype(layer: Any, x: torch.Tensor) -> torch.dtype:
    """The type in which a layer multiplies: its own, or that of its input."""
    own: torch.dtype | None = getattr(layer, "product_dtype", None)
    return own or x.dtype


def _open_plain(layer: Any, dtype: torch.dtype) -> Opened:
    return layer.weight.to(dtype), None


def _open_int8(layer: Any, dtype: torch.dtype) -> Opened:
    return layer.weight.to(dtype), layer.scale.to(dtype)


def _open_4bit(layer: Any, dtype: torch.dtype) -> Opened:
    dequantise = light_import("bitsandbytes.functional").dequantize_4bit
    return dequantise(layer.weight.data, layer.weight.quant_state).to(dtype), None


# By name, so that a plain model does not pay for importing bitsandbytes.
OPENERS: dict[str, Callable[[Any, torch.dtype], Opened]] = {"Linear4bit": _open_4bit, "Int8Linear": _open_int8}


REGAINED = "regained"
"""Attribute of a layer: a (r, d_in) and b (d_out, r) of what it lost when it was quantised, frozen; most have none."""


def opener_of(layer: Any) -> Callable[[Any, torch.dtype], Opened]:
    """How the weight of a layer is opened: by the name of its class, and plainly where the table does not name it."""
    return OPENERS.get(type(layer).__name__, _open_plain)


def opened_weight(layer: Any) -> torch.Tensor:
    """(d_out, d_in) float32, the frozen weight of a layer of any kind, with what is regained of it.

    Of 4-bit weights as they are: rounded to bfloat16, whole blocks of equal codes would be off together, and the norm
    of a row by a thousandth.
    """
    state = getattr(layer.weight, "quant_state", None)
    before = None if state is None else state.dtype
    try:
        if state is not None:
            state.dtype = torch.float32
        weight, scale = opener_of(layer)(layer, torch.float32)
    finally:
        if state is not None:
            state.dtype = before
    whole: torch.Tensor = weight if scale is None else weight * scale.reshape(-1, 1)
    for narrow, wide in _regained(layer):
        whole = whole + wide.float() @ narrow.float()
    return whole


def _regained(layer: Any) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    found = getattr(layer, REGAINED, None)
    return () if found is None else (found,)


# torch offers no other way to state a gradient than this subclass.
class _AdaptedProduct(torch.autograd.Function):
    """The product above; gradients of x, A and B."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - autograd passes tensors one by one, or does not see them
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        held_a: torch.Tensor | None,
        held_b: torch.Tensor | None,
        layer: Any,
        scaling: float,
    ) -> torch.Tensor:
        kind = product_dtype(layer, x)
        rows = x.reshape(-1, x.shape[-1]).to(kind)
        weight, scale = opener_of(layer)(layer, kind)
        bias = layer.bias
        if scale is None:
            y = functional.linear(rows, weight, None if bias is None else bias.to(kind))
        else:
            y = functional.linear(rows, weight).mul_(scale)
            if bias is not None:
                y += bias.to(kind)
        del weight
        for narrow, wide in _regained(layer):
            y.addmm_(rows @ narrow.to(kind).T, wide.to(kind).T)
        for down, up in ((held_a, held_b), (a, b)):
            if down is not None and up is not None:
                y.addmm_(rows @ down.to(kind).T, up.to(kind).T, alpha=scaling)
        # What only the gradients of A and B need is kept only for them.
        learnt = any(factor is not None and factor.requires_grad for factor in (a, b))
        ctx.save_for_backward(x if learnt else None, a, b, held_a, held_b)
        ctx.layer, ctx.scaling, ctx.narrow = layer, scaling, x.dtype
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, held_a, held_b = ctx.saved_tensors
        kind = product_dtype(ctx.layer, gradients[0])
        g = gradients[0].reshape(-1, gradients[0].shape[-1]).to(kind)
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            weight, scale = opener_of(ctx.layer)(ctx.layer, kind)
            dx = (g if scale is None else g * scale) @ weight
            del weight
            for narrow, wide in _regained(ctx.layer):
                dx.addmm_(g @ wide.to(kind), narrow.to(kind))
            if held_a is not None:
                dx.addmm_(g @ held_b.to(kind), held_a.to(kind), alpha=ctx.scaling)
        if a is not None:
            inner = (g @ b.to(kind)).mul_(ctx.scaling)
            down = a.to(kind)
            if dx is not None:
                dx.addmm_(inner, down)
            if x is not None:
                rows = x.reshape(-1, x.shape[-1]).to(kind)
                if ctx.needs_input_grad[1]:
                    da = (inner.T @ rows).to(a.dtype)
                if ctx.needs_input_grad[2]:
                    db = (g.T @ (rows @ down.T)).to(b.dtype).mul_(ctx.scaling)
        if dx is not None:
            dx = dx.to(ctx.narrow).view(*gradients[0].shape[:-1], dx.shape[-1])
        return dx, da, db, None, None, None, None


def frozen_product(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The product of a frozen linear layer of any kind that `OPENERS` knows; keeps nothing for the backward pass.

    Args:
        layer: with its weight and bias, and `product_dtype` where it multiplies in another type than that of `x`.
        x: (…, d_in), any floating precision.

    Returns:
        (…, d_out), in the precision of `x`.
    """
    y: torch.Tensor = _AdaptedProduct.apply(x, None, None, None, None, layer, 1.0)  # type: ignore[no-untyped-call]
    return y


class LoraLinear(torch.nn.Module):
    """A frozen linear layer of any kind that `OPENERS` knows, with directions that are trained and directions held.

    Attributes:
        base: the layer as it was.
        scaling: lora_alpha / r.
        a, b: (r, d_in) and (d_out, r), float32, trained; None where nothing is.
        held_a, held_b: the same, frozen, any floating precision.
        enabled: False while the base shall compute alone.
        order: None; else all directions are multiplied at once, in this order of those trained and, after them, held.
    """

    def __init__(self, base: Any, *, trained: int, held: int, scaling: float, held_dtype: torch.dtype) -> None:
        """Beside `base`, as many directions trained and held; all of no effect until they are written."""
        super().__init__()
        self.base, self.scaling, self.enabled = base, scaling, True
        self.order: torch.Tensor | None = None
        self.in_features, self.out_features = int(base.in_features), int(base.out_features)
        device = base.weight.device

        def zeros(rows: int, columns: int, dtype: torch.dtype) -> torch.nn.Parameter | None:
            if not rows or not columns:
                return None
            return torch.nn.Parameter(torch.zeros(rows, columns, dtype=dtype, device=device), requires_grad=False)

        self.a, self.b = (
            zeros(trained, self.in_features, torch.float32),
            zeros(self.out_features, trained, torch.float32),
        )
        self.held_a, self.held_b = zeros(held, self.in_features, held_dtype), zeros(self.out_features, held, held_dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, as it is kept: whoever asks a layer where it lives asks its weight."""
        weight: torch.Tensor = self.base.weight
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, d_in) → (…, d_out), in the precision of `x`."""
        factors: tuple[torch.Tensor | None, ...] = (self.a, self.b, self.held_a, self.held_b)
        if not self.enabled:
            factors = (None,) * 4
        elif self.order is not None:
            downs, ups = (self.a, self.held_a), (self.b, self.held_b)
            a = torch.cat([down.float() for down in downs if down is not None])[self.order]
            b = torch.cat([up.float() for up in ups if up is not None], dim=1)[:, self.order]
            factors = (a, b, None, None)
        y: torch.Tensor = _AdaptedProduct.apply(x, *factors, self.base, self.scaling)  # type: ignore[no-untyped-call]
        return y
