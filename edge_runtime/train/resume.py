"""Where a local round stands between two steps: enough to go on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from edge_runtime.errors import RoundError
from edge_runtime.lora.adapter import Matrix


@dataclass(frozen=True)
class StepReport:
    """One optimiser step.

    Attributes:
        step: counted from 1.
        steps: of the whole round.
        loss: mean over the step's completion tokens, before the step, in nats.
        tokens: completion tokens of the step.
        learning_rate: of this step.
        gradient_norm: before clipping.
    """

    step: int
    steps: int
    loss: float
    tokens: int
    learning_rate: float
    gradient_norm: float


@dataclass(frozen=True, eq=False)
class RoundState:
    """A round after some of its steps, as values: it can be kept in memory or on disk.

    Attributes:
        reports: one for each step done.
        parameters: the trainable parameters by name, as they live in the model (scale not folded).
        first_moments: Adam's running mean of each gradient.
        second_moments: Adam's running mean of each squared gradient.
    """

    reports: tuple[StepReport, ...]
    parameters: Mapping[str, Matrix]
    first_moments: Mapping[str, Matrix]
    second_moments: Mapping[str, Matrix]


def capture(
    parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, reports: tuple[StepReport, ...]
) -> RoundState:
    """The state of a round as copies, which later steps do not touch."""
    moments = {name: optimizer.state[parameter] for name, parameter in parameters.items()}
    return RoundState(
        reports=reports,
        parameters={name: _copied(parameter) for name, parameter in parameters.items()},
        first_moments={name: _copied(found["exp_avg"]) for name, found in moments.items() if found},
        second_moments={name: _copied(found["exp_avg_sq"]) for name, found in moments.items() if found},
    )


def restore(parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, state: RoundState) -> None:
    """Put a captured state back into the live parameters and the optimiser, bit for bit.

    Raises:
        RoundError: the state is of another slot: other parameters, or other shapes.
    """
    live = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    kept = {name: values.shape for name, values in state.parameters.items()}
    if live != kept:
        different = sorted(name for name, _ in live.items() ^ kept.items())
        raise RoundError(
            f"the interrupted round trained other parameters than this one ({different[0]} differs); start it afresh"
        )
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(state.parameters[name].copy()))
        if name in state.first_moments:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(len(state.reports))),
                "exp_avg": _like(parameter, state.first_moments[name]),
                "exp_avg_sq": _like(parameter, state.second_moments[name]),
            }


def _copied(tensor: torch.Tensor) -> Matrix:
    return np.array(tensor.detach().to("cpu", torch.float32).numpy(), copy=True)


def _like(parameter: torch.nn.Parameter, values: Matrix) -> torch.Tensor:
    return torch.from_numpy(values.copy()).to(parameter.device)
