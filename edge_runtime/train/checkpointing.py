"""Activation checkpointing of some layers: they recompute their activations, and the others keep them.

Kept are those of the last layers. The backward pass begins there, so it has let go of all that they kept before it
recomputes the first of the others: at no moment is there both. That is why keeping the last layer costs no memory, and
why which layers keep theirs is a number and no list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def checkpointing(causal: Any, recomputed: int | None) -> Iterator[None]:
    """Within it, layers recompute their activations; afterwards none does.

    Args:
        causal: a causal language model of transformers, of whose layers the trained ones require gradients.
        recomputed: so many of the layers that the backward pass goes through, the first ones; None for all of them.
    """
    if recomputed == 0:
        yield
        return
    # Without re-entrance the graph starts at the first trained layer: nothing below it is kept or recomputed, and the
    # embeddings need not pretend to require gradients.
    causal.gradient_checkpointing_enable({"use_reentrant": False})
    # transformers 5 makes them pretend all the same, and would recompute every frozen layer.
    if hasattr(causal, "_require_grads_hook"):
        causal.disable_input_require_grads()
    try:
        for layer in () if recomputed is None else backward_layers(causal)[recomputed:]:
            layer.gradient_checkpointing = False
        yield
    finally:
        causal.gradient_checkpointing_disable()


def backward_layers(causal: Any) -> Sequence[Any]:
    """The layers from the first one that is trained to the last one, in the order of the forward pass."""
    layers = decoder_layers(causal)
    trained = (at for at, layer in enumerate(layers) if any(each.requires_grad for each in layer.parameters()))
    # Where none is trained, what is trained is before them: embeddings of virtual tokens.
    return layers[next(trained, 0) :]


def for_memory(causal: Any, recomputed: int | None) -> bool:
    """Whether as many layers are recomputed as can save memory.

    Keeping all of the last layer costs nothing, so whoever recomputes the others has no room for more.
    """
    return recomputed is None or recomputed >= max(1, len(backward_layers(causal)) - 1)


def decoder_layers(causal: Any) -> Sequence[Any]:
    """The layers of a causal language model of transformers, in the order of the forward pass."""
    layers: Sequence[Any] = getattr(causal, causal.base_model_prefix).layers
    return layers


def released_layers(causal: Any) -> Sequence[Any]:
    """The decoder layers between which the heap is released; none on a GPU, whose memory no heap of ours holds."""
    on_card = causal.get_input_embeddings().weight.device.type != "cpu"
    return () if on_card else decoder_layers(causal)
