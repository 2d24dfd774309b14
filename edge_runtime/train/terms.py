"""Terms beside the loss that hold a device near its fleet, as gradients that are added to the loss's own.

The first two are functions of the product BA alone, scale folded in, and never of B and A each: the server may hand out
the same global adapter in other factors at every version, and a pull on factors would depend on which. Dense products
are never formed; a layer costs O((d_out + d_in) r²) a step, next to nothing beside a pass through the model.

    proximal   μ/2 ‖BA - B₀A₀‖²   B₀A₀ is the slice as it was received
    push       c ⟨P, BA⟩          P is what `drift` made of two rounds
    tail       λ ‖B_t‖ ‖A_t‖      t are the last directions of a slice whose order the server keeps

Sources: FedProx (Li et al., MLSys 2020, arXiv 1812.06127); differs: the distance is that of products. SCAFFOLD
(Karimireddy et al., ICML 2020, arXiv 1910.06378) and FedCM (Xu et al., 2021, arXiv 2106.10874): see `drift`. HetLoRA
(Cho et al., EMNLP 2024, arXiv 2401.06432): see `lora.pruning`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from edge_runtime.lora.adapter import Matrix, Pair
from edge_runtime.lora.pruning import stays

Parameters = Mapping[str, torch.nn.Parameter]
"""`<layer>.a` (r, d_in) and `<layer>.b` (d_out, r), scale not folded, each with its gradient where it is trained."""

Term = Callable[[Parameters], None]
"""Adds the gradient of the term to that of the parameters, in place."""


def proximal(before: Mapping[str, Pair], strength: float, scaling: float) -> Term:
    """μ/2 ‖s B A - B₀ A₀‖², all layers together.

    With δA = A - A₀ and δB = s B - B₀ the difference is s B δA + δB A₀, in which nothing cancels: at the beginning of a
    round the gradient is exactly zero.

    Args:
        before: the slice as it was received, scale folded in.
        strength: μ.
        scaling: s, PEFT's lora_alpha / r.
    """

    def add(parameters: Parameters) -> None:
        with torch.no_grad():
            for name, pair in before.items():
                a, b = parameters[f"{name}.a"], parameters[f"{name}.b"]
                a_0, b_0 = _beside(pair.a, a), _beside(pair.b, b)
                scaled = scaling * b
                moved_a, moved_b = a - a_0, scaled - b_0
                _add(a, (scaled.T @ scaled) @ moved_a + (scaled.T @ moved_b) @ a_0, strength)
                _add(b, scaled @ (moved_a @ a.T) + moved_b @ (a_0 @ a.T), strength * scaling)

    return add


def push(direction: Mapping[str, Pair], strength: float, scaling: float) -> Term:
    """C ⟨P, s B A⟩, all layers together.

    Args:
        direction: P of each layer that has one, factored: (d_out, q) and (q, d_in).
        strength: c.
        scaling: s.
    """

    def add(parameters: Parameters) -> None:
        with torch.no_grad():
            for name, pair in direction.items():
                a, b = parameters[f"{name}.a"], parameters[f"{name}.b"]
                p_a, p_b = _beside(pair.a, a), _beside(pair.b, b)
                _add(a, (b.T @ p_b) @ p_a, strength * scaling)
                _add(b, p_b @ (p_a @ a.T), strength * scaling)

    return add


def tail(kept: float, strength: float, scaling: float) -> Term:
    """λ ‖s B_t‖ ‖A_t‖, all layers together; the tail of a layer is what lies beyond floor(kept r) directions.

    Args:
        kept: share of the directions that are no tail; see `lora.pruning`.
        strength: λ.
        scaling: s.
    """

    def add(parameters: Parameters) -> None:
        with torch.no_grad():
            for name in (found.removesuffix(".a") for found in parameters if found.endswith(".a")):
                a, b = parameters[f"{name}.a"], parameters[f"{name}.b"]
                start = stays(a.shape[0], kept)
                of_a, of_b = torch.zeros_like(a), torch.zeros_like(b)
                of_a[start:], of_b[:, start:] = a[start:], b[:, start:]
                size_a, size_b = torch.linalg.vector_norm(of_a), torch.linalg.vector_norm(of_b)
                # Where one of the norms is zero it has no gradient, and the other one is not pulled.
                if size_a > 0 and size_b > 0:
                    _add(a, of_a * (size_b / size_a), strength * scaling)
                    _add(b, of_b * (size_a / size_b), strength * scaling)

    return add


def _beside(values: Matrix, parameter: torch.nn.Parameter) -> torch.Tensor:
    """The values where the parameter is; on a CPU they are the same memory."""
    return torch.from_numpy(values).to(parameter.device)


def _add(parameter: torch.nn.Parameter, gradient: torch.Tensor, factor: float) -> None:
    if not parameter.requires_grad:
        return  # a factor that this round leaves as it is
    if parameter.grad is None:
        raise ValueError("a term is added to a gradient; found a parameter without one")
    parameter.grad.add_(gradient, alpha=factor)
