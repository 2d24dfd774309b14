"""What a dense tensor does to a module of the base model: one wrapper for each kind of tensor, and a literal table.

A wrapper stands in the place of its module, computes what the module computes, and adds to it what the tensor T says.
T is what changed since the start, so T = 0 is the base model; where a start must not be zero (the hidden units of a
bottleneck) it is drawn from the layer's name and the same on all devices.

    scale      y = (W x + bias) ⊙ (1 + t)           (IA)³, arXiv 2205.05638
    scale_in   y = W (x ⊙ (1 + t)) + bias           the same, of a feed-forward layer's input
    bias       y = W x + bias + t                   BitFit, arXiv 2106.10199
    weight     the norm with the weight w + t       LayerNorm tuning, arXiv 2312.11420
    values     y = (W + S) x + bias                 S has the values at a fixed mask: SHiRA, arXiv 2406.13175
    hidden     y' = y + Uᵀ gelu(D y + c)            a bottleneck behind the module, arXiv 1902.00751
    magnitude  see `dora`
    prompt, prefix   see `virtual`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional

from edge_runtime.lora.dense import tensor_of
from edge_runtime.lora.named_draws import places, uniform
from edge_runtime.train.dense_tensor import DenseTensor
from edge_runtime.train.dora import Magnitude
from edge_runtime.train.lora_linear import frozen_product
from edge_runtime.train.pieces import rms_norm
from edge_runtime.train.virtual import Prefixed, Prompted


class Wrapper(Protocol):
    """A module in the place of another.

    Attributes:
        base: the module as it was.
        tensor: what is added.
        enabled: False while the base shall compute alone.
    """

    base: Any
    tensor: DenseTensor
    enabled: bool


class Scaled(torch.nn.Module):
    """A linear layer with its output scaled, or its input."""

    def __init__(self, base: Any, tensor: DenseTensor, name: str) -> None:
        super().__init__()
        self.base, self.tensor, self.enabled = base, tensor, True
        self._of_input = tensor_of(name) == "scale_in"

    @property
    def weight(self) -> torch.Tensor:
        """The base's."""
        return _weight(self.base)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, d_in) → (…, d_out)."""
        if not self.enabled:
            return frozen_product(self.base, x)
        # In float32 up to the product: a factor near 1 has no room for a small change in a narrow type.
        scale: torch.Tensor = 1.0 + self.tensor()[0]
        if self._of_input:
            return frozen_product(self.base, (x * scale).to(x.dtype))
        return (frozen_product(self.base, x) * scale).to(x.dtype)


class Biased(torch.nn.Module):
    """A linear layer with a bias, or with another one."""

    def __init__(self, base: Any, tensor: DenseTensor, name: str) -> None:  # noqa: ARG002 - all wrappers are made alike
        super().__init__()
        self.base, self.tensor, self.enabled = base, tensor, True

    @property
    def weight(self) -> torch.Tensor:
        """The base's."""
        return _weight(self.base)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, d_in) → (…, d_out)."""
        y = frozen_product(self.base, x)
        return (y + self.tensor()[0]).to(y.dtype) if self.enabled else y


class Normed(torch.nn.Module):
    """A norm with another weight."""

    def __init__(self, base: Any, tensor: DenseTensor, name: str) -> None:  # noqa: ARG002 - as above
        super().__init__()
        self.base, self.tensor, self.enabled = base, tensor, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, d) → the same."""
        if not self.enabled:
            y: torch.Tensor = self.base(x)
            return y
        weight = self.base.weight.float() + self.tensor()[0]
        if hasattr(self.base, "variance_epsilon"):
            # Of these classes `lean` replaces the forward pass by one that has no gradient for the weight.
            scaled: torch.Tensor = weight * rms_norm(x, x.new_ones(x.shape[-1]), self.base.variance_epsilon)
        else:
            scaled = functional_call(self.base, {"weight": weight}, (x,))
        return scaled.to(x.dtype)


class _SparseProduct(torch.autograd.Function):
    """X Sᵀ for a matrix S of few entries; keeps x, the values and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        ctx.save_for_backward(x, values, mask)
        ctx.shape = shape
        return functional.linear(x, _spread(values, mask, shape, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, values, mask = ctx.saved_tensors
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        dx = dv = None
        if ctx.needs_input_grad[0]:
            dx = (g @ _spread(values, mask, ctx.shape, g.dtype)).view_as(x)
        if ctx.needs_input_grad[1]:
            dv = (g.T @ x.reshape(-1, x.shape[-1])).flatten()[mask].to(values.dtype)
        return dx, dv, None, None


def _spread(values: torch.Tensor, mask: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    flat = torch.zeros(shape[0] * shape[1], dtype=dtype, device=values.device)
    flat[mask] = values.to(dtype)
    return flat.view(shape)


class Sparse(torch.nn.Module):
    """A linear layer, some entries of whose weight are others; which ones, its name and its size say.

    Row i of the tensor has the values of the i-th d_in + d_out entries, so that rank r costs what rank r of LoRA costs.
    """

    def __init__(self, base: Any, tensor: DenseTensor, name: str) -> None:
        super().__init__()
        self.base, self.tensor, self.enabled = base, tensor, True
        self._shape = int(base.out_features), int(base.in_features)
        held = tensor().numel()
        self.mask = torch.from_numpy(mask_of(name, held, self._shape)).to(base.weight.device)

    @property
    def weight(self) -> torch.Tensor:
        """The base's."""
        return _weight(self.base)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, d_in) → (…, d_out)."""
        y = frozen_product(self.base, x)
        if not self.enabled:
            return y
        added: torch.Tensor = _SparseProduct.apply(x, self.tensor().flatten(), self.mask, self._shape)  # type: ignore[no-untyped-call]
        return y + added


def mask_of(name: str, count: int, shape: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(count,) entries of a weight of that shape, numbered by rows, that belong to a layer of that name."""
    return places(f"mask:{name}", count, shape[0] * shape[1])


class Bottleneck(torch.nn.Module):
    """A linear layer with a bottleneck behind it: d → hidden units → d, beside the identity.

    Row j of the tensor is hidden unit j: its d weights down, its bias, and its d weights up.
    """

    def __init__(self, base: Any, tensor: DenseTensor, name: str) -> None:
        super().__init__()
        self.base, self.tensor, self.enabled = base, tensor, True
        held, width = tensor().shape[0], int(base.out_features)
        start = np.zeros((held, 2 * width + 1), np.float32)
        for unit in range(held):
            start[unit, :width] = uniform(f"hidden:{name}:{unit}", width, 1.0 / math.sqrt(width))
        self.register_buffer("start", torch.from_numpy(start).to(base.weight.device), persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """The base's."""
        return _weight(self.base)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, d_in) → (…, d_out)."""
        y = frozen_product(self.base, x)
        if not self.enabled:
            return y
        units: torch.Tensor = (self.start + self.tensor()).to(y.dtype)
        width = y.shape[-1]
        hidden = functional.gelu(functional.linear(y, units[:, :width], units[:, width]))
        return y + hidden @ units[:, width + 1 :]


def _weight(base: Any) -> torch.Tensor:
    """Whoever asks a layer where it lives asks its weight."""
    weight: torch.Tensor = base.weight
    return weight


class Kind(NamedTuple):
    """One kind of tensor.

    Attributes:
        wrap: (module, tensor, layer's name) → what stands in the module's place.
        width: module → numbers of a row.
    """

    wrap: Callable[[Any, DenseTensor, str], Any]
    width: Callable[[Any], int]


def _out(module: Any) -> int:
    return int(module.out_features)


KINDS: Mapping[str, Kind] = {
    "scale": Kind(Scaled, _out),
    "scale_in": Kind(Scaled, lambda module: int(module.in_features)),
    "bias": Kind(Biased, _out),
    "weight": Kind(Normed, lambda module: int(module.weight.shape[0])),
    "values": Kind(Sparse, lambda module: int(module.in_features + module.out_features)),
    "hidden": Kind(Bottleneck, lambda module: 2 * _out(module) + 1),
    "magnitude": Kind(Magnitude, _out),
    "prompt": Kind(Prompted, lambda module: int(module.weight.shape[1])),
    "prefix": Kind(Prefixed, _out),
}
"""A tensor's name, as it stands in the names of layers, → how it lives in a model."""
