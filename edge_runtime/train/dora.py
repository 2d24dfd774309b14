"""DoRA on a live model: the magnitude of each row of the weight beside its direction, which low-rank pairs change.

    y = (m / ‖W + s B A‖) ⊙ ((W + s B A) x) + bias,     m = ‖W‖ + t,     norms of rows

t is the dense tensor that is trained, merged and sent: how far the magnitudes are from the base's own. So a device over
a quantised base begins at its own base, exactly. The norm below is a constant to the backward pass, as in the paper.

Source: DoRA (Liu et al., ICML 2024, arXiv 2402.09353), section 4.3. Differs from it: the norm is computed from factors,
‖W + s B A‖² = ‖W‖² + 2 s diag(W Aᵀ Bᵀ) + s² diag(B A Aᵀ Bᵀ), and no second weight is ever made.
"""

from __future__ import annotations

import torch

from edge_runtime.train.dense_tensor import DenseTensor
from edge_runtime.train.lora_linear import LoraLinear, frozen_product, opened_weight


class Magnitude(torch.nn.Module):
    """A linear layer with low-rank directions, its rows scaled to a magnitude of their own.

    Attributes:
        base: the layer with its directions.
        norms: (d_out,) float32, of the rows of the frozen weight.
    """

    def __init__(self, base: LoraLinear, tensor: DenseTensor, name: str) -> None:  # noqa: ARG002 - wrappers are made alike
        super().__init__()
        self.base, self.tensor, self.enabled = base, tensor, True
        with torch.no_grad():
            self._squares = opened_weight(base.base).square().sum(1)
        self.norms = self._squares.sqrt()

    # Whoever reads or writes the pair finds it where the slot says that it is.
    @property
    def a(self) -> torch.nn.Parameter | None:
        """See `LoraLinear`."""
        return self.base.a

    @property
    def b(self) -> torch.nn.Parameter | None:
        """See `LoraLinear`."""
        return self.base.b

    @property
    def held_a(self) -> torch.nn.Parameter | None:
        """See `LoraLinear`."""
        return self.base.held_a

    @property
    def held_b(self) -> torch.nn.Parameter | None:
        """See `LoraLinear`."""
        return self.base.held_b

    @property
    def order(self) -> torch.Tensor | None:
        """See `LoraLinear`."""
        return self.base.order

    @order.setter
    def order(self, order: torch.Tensor | None) -> None:
        self.base.order = order

    @property
    def weight(self) -> torch.Tensor:
        """The frozen one, as it is kept."""
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, d_in) → (…, d_out), in the precision of `x`."""
        if not self.enabled:
            return frozen_product(self.base.base, x)
        y: torch.Tensor = self.base(x)
        with torch.no_grad():
            under = self._norms_now()
        # In float32 up to the product: a factor near 1 has no room for a small change in a narrow type.
        factor, bias = (self.norms + self.tensor()[0]) / under, self.base.base.bias
        scaled: torch.Tensor = y * factor if bias is None else (y - bias) * factor + bias
        return scaled.to(y.dtype)

    def _norms_now(self) -> torch.Tensor:
        """(d_out,) ‖W + s B A‖ of each row; exactly that of W while B is zero."""
        pairs = [(self.a, self.b), (self.held_a, self.held_b)]
        found = [(a.float(), b.float()) for a, b in pairs if a is not None and b is not None]
        a = torch.cat([a for a, _ in found])
        b = torch.cat([b for _, b in found], 1) * self.base.scaling
        crossed = ((opened_weight(self.base.base) @ a.T) * b).sum(1)
        own = ((b @ (a @ a.T)) * b).sum(1)
        return (self._squares + 2 * crossed + own).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
