"""Where a local round stands between two steps: enough to go on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from edge_runtime.errors import RoundError
from edge_runtime.lora.adapter import Matrix
from edge_runtime.train.optimizer import Array


@dataclass(frozen=True)
class StepReport:
    """One optimiser step.

    Attributes:
        step: counted from 1.
        steps: of the whole round.
        loss: mean over the step's completion tokens, before the step, in nats.
        tokens: completion tokens of the step.
        learning_rate: of this step.
        gradient_norm: before clipping, with all terms beside the loss.
        loss_gradient_norm: the same of the loss alone; 0 where an older version did not note it.
    """

    step: int
    steps: int
    loss: float
    tokens: int
    learning_rate: float
    gradient_norm: float
    loss_gradient_norm: float = 0.0


@dataclass(frozen=True, eq=False)
class RoundState:
    """A round after some of its steps, as values: it can be kept in memory or on disk.

    Our own loop takes the batch of a step from the step's number alone (`data.batch_at`), and seeds torch for each step
    from the task's seed and that number. So it needs neither `position` nor `rng` to go on; they are there for whoever
    draws batches and random numbers in another way.

    Attributes:
        reports: one for each step done.
        parameters: the trainable parameters by name, as they live in the model (scale not folded).
        moments: all that the optimiser holds, by parameter and then by the optimiser's own names. Arrays that several
            parameters share, such as the values of 8-bit codes, are one object here as well.
        position: optimiser steps whose batches were drawn.
        rng: torch's CPU random state (`torch.get_rng_state()`) as bytes; empty where each step is seeded.
        beside: what the terms beside the loss need to go on, by name (see `drift`); the loop only hands it on.
    """

    reports: tuple[StepReport, ...]
    parameters: dict[str, Matrix]
    moments: dict[str, dict[str, Array]]
    position: int
    rng: bytes = b""
    beside: Mapping[str, Array] = field(default_factory=dict)


class NotFiniteError(RoundError):
    """A loss or gradient that is not finite; the step was not taken.

    It stands here and not in the tree's own module because it brings the round as it was before that step.

    Attributes:
        state: the last good one; None where the error has not left the step yet.
    """

    def __init__(self, message: str, state: RoundState | None = None) -> None:
        super().__init__(message)
        self.state = state


def capture(
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    reports: tuple[StepReport, ...],
    *,
    rng: bytes = b"",
    beside: Mapping[str, Array] | None = None,
    copy: bool = True,
) -> RoundState:
    """The state of a round.

    Args:
        parameters: those that are trained, by name.
        optimizer: over these parameters.
        reports: one for each step done.
        rng: see RoundState.
        beside: likewise; no step changes it.
        copy: whether later steps must not touch the state. Without, it takes no memory of its own on a CPU, and is good
            only until the next step.
    """
    seen: dict[int, Array] = {}

    def taken(value: Any) -> Array:
        if not isinstance(value, torch.Tensor):
            return np.array(value, np.int64)
        if id(value) not in seen:
            plain: Array = value.detach().cpu().numpy()
            seen[id(value)] = plain.copy() if copy else plain
        return seen[id(value)]

    return RoundState(
        reports=reports,
        parameters={name: taken(parameter) for name, parameter in parameters.items()},
        moments={
            name: {entry: taken(value) for entry, value in optimizer.state[parameter].items()}
            for name, parameter in parameters.items()
            if optimizer.state.get(parameter)
        },
        position=len(reports),
        rng=rng,
        beside=beside or {},
    )


def restore(parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, state: RoundState) -> None:
    """Put a captured state back into the live parameters and the optimiser, bit for bit.

    The state is used up: its arrays are let go one after the other, so that a small device never holds all of it twice.

    Raises:
        RoundError: the state is of another slot (other parameters, or other shapes), or was used up before.
    """
    live = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    kept = {name: values.shape for name, values in state.parameters.items()}
    if live != kept:
        different = sorted(name for name, _ in live.items() ^ kept.items())
        raise RoundError(
            f"the interrupted round trained other parameters than this one ({different[0]} differs); start it afresh"
        )
    shared: dict[int, tuple[Array, torch.Tensor]] = {}
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(state.parameters.pop(name)))
        entries = state.moments.pop(name, None)
        if entries:
            optimizer.state[parameter] = {
                entry: _given(entries.pop(entry), parameter.device, shared) for entry in tuple(entries)
            }


def _given(values: Array, device: torch.device, shared: dict[int, tuple[Array, torch.Tensor]]) -> Any:
    """An array as a tensor of torch's own, or the Python number that it was."""
    if values.ndim == 0 and values.dtype == np.int64:
        return int(values)
    if values.ndim != 1:  # only vectors are shared: tables of codes
        return torch.tensor(values, device=device)
    if id(values) not in shared:
        # The array stays with its tensor, or another could come to have its id.
        shared[id(values)] = values, torch.tensor(values, device=device)
    return shared[id(values)][1]
