"""How much each held direction matters to this device's own data: |uᵢᵀ ∇ vᵢ|, for the slice policy `personal`.

∇ is the gradient of a layer's weight, which is never formed: Σ over tokens of (g uᵢ)(x vᵢ), g the gradient of the
layer's output and x its input. One forward and backward pass over a few batches, in the memory of a training step
without its optimiser. A direction with b = 0 has no uᵢ, and no score.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from edge_runtime.lora.slices import Scores
from edge_runtime.train import families, heap
from edge_runtime.train.batches import pack_together
from edge_runtime.train.data import Tokenised, batch_at
from edge_runtime.train.exhaustion import bearing
from edge_runtime.train.live import LiveModel
from edge_runtime.train.loop import LocalTask, training_mode
from edge_runtime.train.loss import completion_loss, unwrap
from edge_runtime.train.packing import pack

BATCHES = 4
"""Batches of an optimiser step that are looked at."""


def scores(live: LiveModel, examples: Sequence[Tokenised], task: LocalTask) -> dict[str, Scores]:
    """Layer → (held,) scores of its directions, of the layers that are trained. The model is left as it was.

    The same model, examples and task give the same numbers.

    Args:
        live: holds the global adapter.
        examples: the device's own, at least one.
        task: how its steps pass through the model.

    Raises:
        DeviceMemoryError: memory ran out.
    """
    parameters = families.get(task.family).trainable(live)
    causal = unwrap(live.model)
    device = causal.get_input_embeddings().weight.device
    try:
        with training_mode(live, task), watching(live) as found, bearing("looking for the directions that matter"):
            for batch in range(BATCHES):
                indices = batch_at(batch, count=len(examples), micro_batch=task.batch_size, seed=task.seed)
                chosen = [examples[index] for index in dict.fromkeys(indices)]
                lengths = [len(example.input_ids) for example in chosen]
                for members in pack(lengths, task.pack_tokens or task.micro_batch * max(lengths)):
                    row = pack_together([chosen[member] for member in members], device)
                    loss = completion_loss(live.model, row.input_ids, row.labels, row.position_ids, row.lengths)
                    torch.autograd.backward(loss.total)
                    del loss
                    heap.release()
    finally:
        for parameter in parameters.values():
            parameter.grad = None
    return sized(found)


def sized(found: Mapping[str, torch.Tensor]) -> dict[str, Scores]:
    """What `watching` added up, as scores: a direction may matter either way."""
    return {name: np.abs(values.numpy()) for name, values in found.items()}


@contextmanager
def watching(live: LiveModel) -> Iterator[dict[str, torch.Tensor]]:
    """Within it, backward passes add up uᵢᵀ ∇ vᵢ; yields layer → (held,) float64, of the layers that are trained."""
    found = {name: torch.zeros(live.slot.layers[name].held, dtype=torch.float64) for name in live.slot.trained}
    hooks = [
        live.model.get_submodule(name).register_forward_hook(partial(_forward, live.directions[name], total))
        for name, total in found.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _forward(rows: Sequence[int], total: torch.Tensor, module: Any, arguments: Any, output: Any) -> None:
    # Where activations are recomputed, the first pass keeps no graph, and only the second one comes here.
    if output.requires_grad:
        x = arguments[0].detach()
        output.register_hook(lambda gradient: _add(total, _scored(module, x, gradient, rows)))


def _add(total: torch.Tensor, scored: torch.Tensor) -> None:
    total += scored


def _scored(module: Any, x: torch.Tensor, gradient: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """(held,): uᵢᵀ ∇ vᵢ of one pass, in the order in which the directions were loaded."""
    kind = torch.float32
    hands = [(a, b) for a, b in ((module.a, module.b), (module.held_a, module.held_b)) if a is not None]
    down = torch.cat([a.detach().to(kind) for a, _ in hands])
    up = torch.cat([b.detach().to(kind) for _, b in hands], dim=1)
    norms = torch.linalg.vector_norm(down, dim=1) * torch.linalg.vector_norm(up, dim=0)
    inner = (gradient.reshape(-1, gradient.shape[-1]).to(kind) @ up) * (x.reshape(-1, x.shape[-1]).to(kind) @ down.T)
    found = (inner.sum(dim=0) / torch.where(norms > 0, norms, 1)).to("cpu", torch.float64)
    taken = set(rows)
    order = [*rows, *(row for row in range(len(found)) if row not in taken)]
    ordered = torch.empty_like(found)
    ordered[order] = found
    return ordered
