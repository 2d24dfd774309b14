"""Cross-entropy of completions without the logits: only the tokens that count, a few at a time.

The logits of a batch are its largest tensor: tokens x vocabulary, in two precisions, and their gradient again. But
the head is frozen, so all that training needs from it is one number and d_hidden; both are computed chunk by chunk in
the forward pass, and positions without a label (the prompt, the padding) never reach the head at all.

Source: the algorithm is the fused linear cross-entropy of Liger Kernel (arXiv:2410.10989, section 3.2).
Differs from the paper: plain torch, no gradient of the head's weight, unlabelled positions are dropped first, and the
chunk follows from a budget in bytes. On CUDA, Liger's own kernel is used where it is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from edge_runtime.errors import BaseModelError
from edge_runtime.train.data import IGNORED

PACKED_LENGTHS = "packed_lengths"
"""The keyword under which a forward pass hands the lengths of a row's examples to the attention of `lean`."""

LOGITS_BYTES = 8 << 20
"""Bytes of one chunk's float32 logits."""

LEAST_TOKENS = 32
"""Tokens of a chunk at least: each chunk reads the whole head, which fewer tokens would not be worth."""

# Each of these would change the logits after the head; left out of the loss, training would follow a wrong gradient.
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "mup_width_multiplier")


@dataclass(frozen=True, eq=False)
class SummedLoss:
    """The loss of a batch as a sum, so that batches of unequal length add up exactly.

    Attributes:
        total: scalar float32, in nats, differentiable; the sum over all labelled tokens.
        tokens: labelled tokens.
    """

    total: torch.Tensor
    tokens: int


class Labelled(NamedTuple):
    """The states of labelled tokens that enter a model's head (tokens, d), their labels (tokens,), and that head."""

    hidden: torch.Tensor
    targets: torch.Tensor
    head: torch.nn.Linear


def chunk_tokens(vocabulary: int) -> int:
    """Tokens of one chunk: as many as fit their float32 logits into LOGITS_BYTES, and at least LEAST_TOKENS."""
    return max(LEAST_TOKENS, LOGITS_BYTES // (4 * vocabulary))


def _float32_at_least(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


# torch offers no other way to state a gradient than this subclass.
class _FrozenHeadLoss(torch.autograd.Function):
    """Sum of the cross-entropies of `hidden @ weight.T + bias`; its gradient reaches `hidden` only."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        chunk: int,
    ) -> torch.Tensor:
        total = _float32_at_least(hidden.new_zeros(()))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            target = labels[part, None]
            logits = _float32_at_least(functional.linear(hidden[part].to(weight.dtype), weight, bias))
            norm = torch.logsumexp(logits, dim=-1, keepdim=True)
            total += (norm - logits.gather(1, target)).sum()
            if gradient is not None:
                # softmax minus one-hot, in place: the chunk's logits are needed no more.
                logits.sub_(norm).exp_().scatter_add_(1, target, -torch.ones_like(norm))
                gradient[part] = (logits.to(weight.dtype) @ weight).to(hidden.dtype)
            del logits  # or it would stay until the next chunk's are there
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None


@cache
def _liger() -> Any:
    """Liger's function; None where it, or the Triton that it needs, is not installed."""
    try:
        # Not the autograd function below it, whose arguments change from release to release.
        return importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    except ImportError:
        return None


# Kernels of others, by the kind of device whose tensors they take.
FUSED: dict[str, Callable[[], Any]] = {"cuda": _liger}


def _fused_for(hidden: torch.Tensor, weight: torch.Tensor) -> Any:
    """The fused kernel for these tensors; None for our own chunks. Liger takes no empty batch and no float64."""
    known = hidden.device.type in FUSED and hidden.shape[0] > 0 and weight.dtype != torch.float64
    return FUSED[hidden.device.type]() if known else None


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """Sum over tokens of the cross-entropy of a frozen linear head.

    Args:
        hidden: (tokens, d), the states that enter the head.
        weight: (vocabulary, d), frozen.
        labels: (tokens,), int64, every one a class: unlabelled positions are dropped by the caller.
        bias: (vocabulary,), frozen.
        chunk: tokens whose logits exist at once, by our own kernel; when absent, `chunk_tokens(vocabulary)`, or a
            kernel of FUSED with its own chunks.

    Returns:
        A scalar, float32 or wider, in nats. It has a first derivative only.

    Raises:
        ValueError: the head's weight or bias asks for a gradient, which this loss does not compute.
    """
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("the head of the chunked loss must be frozen; found a weight or bias that requires a gradient")
    fused = _fused_for(hidden, weight) if chunk is None else None
    if fused is not None:
        fused_total: torch.Tensor = fused(hidden.to(weight.dtype), weight.detach(), labels, bias=bias, reduction="sum")
        return fused_total
    total: torch.Tensor = _FrozenHeadLoss.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        hidden, weight, bias, labels, chunk or chunk_tokens(weight.shape[0])
    )
    return total


def unwrap(model: Any) -> Any:
    """The Hugging Face model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head_of(causal: Any) -> torch.nn.Linear:
    for option in _LOGIT_TRANSFORMS:
        value = getattr(causal.config, option, None)
        if value not in (None, 1, 1.0):
            raise BaseModelError(
                f"cannot train {type(causal).__name__}: its logits pass through '{option}' ({value}), which this "
                "loss does not apply; use a base model of the Llama, Qwen, Mistral or SmolLM kind"
            )
    head = causal.get_output_embeddings()
    # A quantised or adapted head is a subclass or a wrapper: its weight alone would not give the model's logits.
    if type(head) is not torch.nn.Linear:
        raise BaseModelError(
            f"expected a plain linear head, found {type(head).__name__}; "
            "load the base model with its head unquantised and keep 'lm_head' out of target_modules"
        )
    return head


def completion_loss(
    model: Any,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> SummedLoss:
    """The summed loss of every labelled token, given the tokens before it.

    Args:
        model: a causal language model of transformers, wrapped by PEFT or not.
        input_ids: (examples, length), int64, padded on the right; or (1, tokens), examples one behind the other.
        labels: as input_ids; IGNORED where the token has no say, as the first of each packed example.
        position_ids: as input_ids, each token's place in its example; needed for packed examples.
        lengths: of the packed examples; the model must run within `lean.lean` then.

    Raises:
        BaseModelError: a head, or a step after it, that this loss does not know.
    """
    return summed(labelled(model, input_ids, labels, position_ids, lengths))


def summed(found: Labelled) -> SummedLoss:
    """The summed loss of labelled tokens."""
    total = chunked_cross_entropy(found.hidden, found.head.weight, found.targets, bias=found.head.bias)
    return SummedLoss(total, len(found.targets))


def right_tokens(found: Labelled, *, chunk: int | None = None) -> int:
    """How many labelled tokens are those that the model holds most likely.

    Args:
        found: the tokens; no gradient comes of them.
        chunk: tokens whose logits exist at once; `chunk_tokens(vocabulary)` when absent.
    """
    head, right = found.head, 0
    size = chunk or chunk_tokens(head.weight.shape[0])
    with torch.no_grad():
        for start in range(0, len(found.targets), size):
            part = slice(start, start + size)
            logits = functional.linear(found.hidden[part].to(head.weight.dtype), head.weight, head.bias)
            right += int((logits.argmax(dim=-1) == found.targets[part]).sum())
            del logits  # as in the loss
    return right


def labelled(
    model: Any,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> Labelled:
    """Pass examples through a model up to its head.

    The arguments, and what is raised, are those of `completion_loss`.
    """
    causal = unwrap(model)
    head = _head_of(causal)
    backbone = getattr(causal, causal.base_model_prefix)
    packed = {} if lengths is None else {PACKED_LENGTHS: tuple(lengths)}
    # No attention mask: padding is on the right, where a causal model never looks, and its own labels are IGNORED.
    found = backbone(input_ids=input_ids, position_ids=position_ids, use_cache=False, **packed)
    hidden, targets = found.last_hidden_state[:, :-1], labels[:, 1:]
    counted = targets != IGNORED
    return Labelled(hidden[counted], targets[counted], head)
