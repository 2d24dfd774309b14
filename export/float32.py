"""A model that computes in float32 for a while, whatever it trains in, without a float32 copy of it.

Parity is compared in float32, where another order of the same sums differs by little. Widening a whole model would take
the memory of its weights once or twice more, which the device that trained it need not have. So each module is widened
when it is called and narrowed when it returns, the embedding widens only the rows that it looked up, and the head is
multiplied a slice of the vocabulary at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import functional

_KEPT = "_narrow_weights"
HEAD_ROWS = 4096
"""Rows of the head that are widened at a time."""


@contextmanager
def in_float32(model: torch.nn.Module) -> Iterator[None]:
    """Let a model compute in float32 while the context lasts; its weights keep their bits.

    Quantised weights stay quantised and are opened as float32.

    Args:
        model: a causal language model of transformers, wrapped by PEFT or not.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]  # transformers' models and PEFT's have it
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if getattr(module, "product_dtype", None) is not None:
                stack.enter_context(_multiplying_in_float32(module))
            if type(module).__name__ == "Linear4bit" and hasattr(module, "compute_dtype"):
                stack.enter_context(_opened_as_float32(module))
            elif module is head and _is_narrow(module):
                stack.enter_context(_head_in_slices(module))
            elif isinstance(module, torch.nn.Embedding) and _is_narrow(module):
                stack.callback(module.register_forward_hook(_widen_output).remove)
            elif _is_narrow(module) and ".lora_" in name:
                # PEFT casts what enters to the adapter's type before it calls the adapter; and adapters are small.
                _widen(module, None)
                stack.callback(_narrow, module, None, None)
            elif _is_narrow(module):
                stack.callback(module.register_forward_pre_hook(_widen).remove)
                stack.callback(module.register_forward_hook(_narrow, always_call=True).remove)
        yield


def _is_narrow(module: torch.nn.Module) -> bool:
    """Whether parameters of its own, not of its children, are floating point and narrower than float32."""
    return any(p.is_floating_point() and p.dtype.itemsize < 4 for p in module.parameters(recurse=False))


def _widen_output(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.float()


def _widen(module: Any, _inputs: Any) -> None:
    kept = {name: p.data for name, p in module.named_parameters(recurse=False) if p.is_floating_point()}
    vars(module)[_KEPT] = kept
    for name, data in kept.items():
        getattr(module, name).data = data.float()


def _narrow(module: Any, _inputs: Any, _output: Any) -> None:
    for name, data in module.__dict__.pop(_KEPT, {}).items():
        getattr(module, name).data = data


@contextmanager
def _opened_as_float32(layer: Any) -> Iterator[None]:
    state = layer.weight.quant_state
    before = layer.compute_dtype, state.dtype
    layer.compute_dtype = state.dtype = torch.float32
    try:
        yield
    finally:
        layer.compute_dtype, state.dtype = before


@contextmanager
def _multiplying_in_float32(layer: Any) -> Iterator[None]:
    before = layer.product_dtype
    layer.product_dtype = torch.float32
    try:
        yield
    finally:
        layer.product_dtype = before


@contextmanager
def _head_in_slices(head: Any) -> Iterator[None]:
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        parts = [functional.linear(hidden, rows.float()) for rows in head.weight.split(HEAD_ROWS)]
        whole = torch.cat(parts, dim=-1)
        return whole if head.bias is None else whole + head.bias.float()

    before: Callable[..., Any] | None = head.__dict__.get("forward")
    head.forward = forward
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before
