"""Cores: between two frozen bases in the place of a layer's adapter there is a small square, and only it is trained.

    y = W x + B R A x,   A (r, d_in) and B (d_out, r) frozen, R (r, r)

A layer becomes a `CoreLinear`, whose child `core` is a linear layer of its own with weight zero. What is attached there
is an ordinary adapter of an r x r layer, so slots, bands, codecs and methods know nothing of cores. Outside the model
the product is that of the layer itself: see `expanded`.

The bases are orthonormal, drawn from a text that all devices know (the layer's name), so none of them ever travels. The
columns of B have the norm sqrt(d_out / r): then a step of Adam moves the product as far as one of LoRA's `b` would.

Sources of the core: LoRA-XS (Bałazy et al., arXiv 2405.17604) and Fed-SB (Singhal et al., arXiv 2502.15436). Differs
from both: LoRA-XS takes the singular vectors of W, which devices of unlike precision do not have alike, and Fed-SB
those of a gradient, for which the server would need data.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from edge_runtime.lora.adapter import Adapter, Pair, Slot
from edge_runtime.lora.algebra import ROW_NORM, fresh_rows
from edge_runtime.lora.dense import path_of
from edge_runtime.train.lora_linear import frozen_product, product_dtype

CORE = "core"
"""The name of the child that stands for R."""


class CoreLinear(torch.nn.Module):
    """A frozen linear layer with a core between two frozen bases beside it.

    Attributes:
        base: the layer as it was.
        a, b: (r, d_in) and (d_out, r), float32, frozen.
        core: (r, r), weight zero, frozen; an adapter may take its place.
    """

    def __init__(self, base: Any, name: str, size: int) -> None:
        """Beside `base`, the layer of that name, a core of `size` rows and columns, without effect."""
        super().__init__()
        self.base = base
        self.in_features, self.out_features = int(base.in_features), int(base.out_features)
        device = base.weight.device
        a, b = _drawn(f"{name}:a", size, self.in_features), _drawn(f"{name}:b", size, self.out_features)
        self.a = torch.nn.Parameter(torch.from_numpy(a).to(device), requires_grad=False)
        up = np.ascontiguousarray(b.T) * np.float32(np.sqrt(self.out_features / size))
        self.b = torch.nn.Parameter(torch.from_numpy(up).to(device), requires_grad=False)
        self.core = torch.nn.Linear(size, size, bias=False, device=device)
        torch.nn.init.zeros_(self.core.weight)

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, as it is kept: whoever asks a layer where it lives asks its weight."""
        weight: torch.Tensor = self.base.weight
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, d_in) → (…, d_out), in the precision of `x`."""
        kind = product_dtype(self.base, x)
        inner = self.core(functional.linear(x.to(kind), self.a.to(kind)))
        return frozen_product(self.base, x) + functional.linear(inner, self.b.to(kind)).to(x.dtype)


def inserted(model: Any, slot: Slot) -> Any:
    """The model, changed in place: with a core for each layer of a slot that names one."""
    for name, layer in slot.layers.items():
        path = name.removesuffix(f".{CORE}")
        if path == name or isinstance(model.get_submodule(path), CoreLinear):
            continue
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, CoreLinear(model.get_submodule(path), path, layer.d_out))
    return model


def expanded(adapter: Adapter, model: Any) -> Adapter:
    """An adapter of cores as one of the layers that they stand beside; other layers as they are."""
    found = {}
    for name, pair in adapter.items():
        path = name.removesuffix(f".{CORE}")
        layer = model.get_submodule(path_of(path))
        if isinstance(layer, CoreLinear):
            a, b = (factor.detach().cpu().numpy() for factor in (layer.a, layer.b))
            pair = Pair(pair.a @ a, b @ pair.b)  # noqa: PLW2901  the same adapter, seen from outside
        found[path] = pair
    return Adapter(found)


def _drawn(seed: str, size: int, width: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """(size, width): orthonormal rows."""
    rows = fresh_rows(np.zeros((0, width), np.float32), size, f"{CORE}:{seed}")
    return (rows / np.float32(ROW_NORM)).astype(np.float32)
