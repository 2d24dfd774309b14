"""A transformers model whose layers run by our own pieces while it trains, and as they were afterwards.

The modules, their weights and their names stay; for as long as the context lasts, norms, gates and attention of the
classes in `REWRITTEN` compute by `pieces` and `attention`, to the same result. Attention of every other class comes
through transformers' attention interface, so that packed rows work there too. What this saves: see docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from edge_runtime.errors import BaseModelError
from edge_runtime.train.attention import packed_attention
from edge_runtime.train.lora_linear import frozen_product
from edge_runtime.train.loss import PACKED_LENGTHS
from edge_runtime.train.pieces import gated_silu, rms_norm, rotate

INTERFACE = "edge_runtime_packed"
"""Our entry in transformers' table of attention functions."""

# Where transformers keeps the name; its setter would look the name up on the hub.
_IMPLEMENTATION = "_attn_implementation"

TESTED = ("Llama (SmolLM2, TinyLlama)", "Mistral", "Qwen2", "Qwen3")


def _norm(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
    down: torch.Tensor = module.down_proj(gated_silu(module.gate_proj(x), module.up_proj(x)))
    return down


def _attention(
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,  # noqa: ARG001 - the layer passes it; lengths say the same
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    tokens, width = hidden_states.shape[1], module.head_dim
    lengths = _lengths(kwargs, module, tokens)
    half = width // 2
    cos, sin = (angle[0, :, None, :half] for angle in position_embeddings)
    turned = []
    for project, norm in ((module.q_proj, "q_norm"), (module.k_proj, "k_norm")):
        heads = project(hidden_states).view(tokens, -1, width)
        heads = getattr(module, norm)(heads) if hasattr(module, norm) else heads
        turned.append(rotate(heads, cos, sin).transpose(0, 1))
    values = module.v_proj(hidden_states).view(tokens, -1, width).transpose(0, 1)
    mixed = packed_attention(turned[0], turned[1], values, lengths, module.scaling)
    return module.o_proj(mixed.transpose(0, 1).reshape(1, tokens, -1)), None


def _interface(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - as above
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: (1, heads, tokens, d) in, (1, tokens, heads, d) out."""
    lengths = _lengths(kwargs, module, query.shape[2])
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    mixed = packed_attention(query[0], key[0], value[0], lengths, scale)
    return mixed.transpose(0, 1)[None], None


# Class → its forward pass. A class belongs here when a test has compared it with transformers' own.
REWRITTEN: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"), _norm),
    **dict.fromkeys(("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"), _mlp),
    **dict.fromkeys(("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"), _attention),
}


@contextmanager
def lean(causal: Any) -> Iterator[None]:
    """Within it the model takes packed rows, (1, tokens) with `packed_lengths`, and keeps little for its backward pass.

    Args:
        causal: a causal language model of transformers; frozen but for adapters.

    Raises:
        BaseModelError: in the forward pass, where the architecture's attention is not plain causal attention.
    """
    ALL_ATTENTION_FUNCTIONS.register(INTERFACE, _interface)
    with ExitStack() as stack:
        before = getattr(causal.config, _IMPLEMENTATION)
        stack.callback(setattr, causal.config, _IMPLEMENTATION, before)
        setattr(causal.config, _IMPLEMENTATION, INTERFACE)
        for module in causal.modules():
            forward = _rewritten(module)
            if forward is not None and "forward" not in vars(module):
                stack.callback(vars(module).pop, "forward", None)
                module.forward = partial(forward, module)
        yield


def _rewritten(module: Any) -> Callable[..., Any] | None:
    """The forward pass that takes the place of a module's own; None where it keeps its own."""
    if getattr(module, "product_dtype", None) is not None:
        return frozen_product
    return REWRITTEN.get(type(module).__name__) if _as_known(module) else None


def _as_known(module: Any) -> bool:
    """Whether the gate is a silu, for a class that may have another."""
    activation = getattr(getattr(module, "config", None), "hidden_act", "silu")
    return not hasattr(module, "gate_proj") or activation in ("silu", "swish")


def _lengths(kwargs: dict[str, Any], module: Any, tokens: int) -> Sequence[int]:
    """The lengths of the row's examples; one example where nobody says.

    Raises:
        BaseModelError: this attention does more than `packed_attention` does.
    """
    lengths: Sequence[int] = kwargs.get(PACKED_LENGTHS) or (tokens,)
    window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if window is not None and max(lengths) > window:
        unknown.append(f"a sliding window of {window} tokens")
    if unknown or not getattr(module, "is_causal", True):
        raise BaseModelError(
            f"cannot train {type(module).__name__}: its attention has {', '.join(unknown) or 'no causal mask'}; "
            f"tested architectures: {', '.join(TESTED)}"
        )
    return lengths
