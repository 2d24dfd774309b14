"""What becomes of a step's gradient before the update: it is looked for, terms are added, and it is clipped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from edge_runtime.errors import RoundError
from edge_runtime.train import optimizer
from edge_runtime.train.culprit import first_bad_gradient
from edge_runtime.train.resume import NotFiniteError
from edge_runtime.train.terms import Term


class Norms(NamedTuple):
    """Of a step's gradient, before clipping.

    Attributes:
        total: of the loss and all terms.
        loss: of the loss alone.
    """

    total: float
    loss: float


def finish(
    model: Any, parameters: Mapping[str, torch.nn.Parameter], terms: Sequence[Term], most: float, step: int
) -> Norms:
    """Make the gradient that backward passes have added up the one that the optimiser is to follow, in place.

    Args:
        model: the live model, in which the culprit of a gradient that is not finite is looked for.
        parameters: those of the slice, by name; those that require no gradient are left as they are.
        terms: beside the loss.
        most: the joint norm is clipped to this.
        step: counted from 0, for messages.

    Raises:
        RoundError: a parameter has no gradient.
        NotFiniteError: a gradient is not finite; says where.
    """
    # bitsandbytes can lose gradients without a word (its packed CPU kernels have no backward); AdamW would then skip
    # the parameters and the round would end as it began.
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    lost = [name for name, parameter in trained.items() if parameter.grad is None]
    if lost:
        raise RoundError(
            f"step {step + 1}: expected a gradient for each of {len(trained)} parameters, none for {len(lost)} "
            f"({lost[0]}, …); the base model's kernels cut the backward pass: load it without 4-bit weights"
        )
    norms = optimizer.gradient_norms(trained)
    total = loss = math.hypot(*norms.values())
    if terms and math.isfinite(loss):
        for term in terms:
            term(parameters)
        norms = optimizer.gradient_norms(trained)
        total = math.hypot(*norms.values())
    if not math.isfinite(total):
        where = first_bad_gradient(model, norms, trained)
        raise NotFiniteError(
            f"step {step + 1}: expected a finite gradient, found norm {total}, first in that of '{where}'; "
            "lower learning_rate, or compute in float32"
        )
    optimizer.clip(trained, total, most)
    return Norms(total, loss)
