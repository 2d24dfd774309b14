"""The table of optimisers: how each is built over the trained factors, and what its state says of the moments.

Both are AdamW (arXiv 1711.05101). `adamw` keeps 8 bytes for each trained number, `adamw_8bit` 2 (block-wise 8-bit
quantised moments, arXiv 2110.02861); tensors below 4096 numbers stay in 32 bits there. Which one is a matter of memory,
so the device's plan chooses it, not the fleet.

LoRA+ (arXiv 2402.12354): `b`, which begins at zero, learns at a multiple of the rate of `a`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError, missing_extra, unknown_name
from edge_runtime.lora.adapter import Matrix
from edge_runtime.train.quiet import quiet

BETAS = (0.9, 0.999)
EPSILON = 1e-8
BLOCK = 256
"""Numbers that share one scale in 8-bit moments; fixed in bitsandbytes."""

FUSED = frozenset({"cpu", "cuda"})
"""Devices on which torch has one kernel for the whole update."""

Array = NDArray[Any]
Entries = Mapping[str, Array]
"""What an optimiser holds for one parameter, by its own names; a Python number is a 0-d int64."""


class Moments(NamedTuple):
    """Adam's memory of one parameter.

    Attributes:
        first: running mean of the gradient, in the parameter's shape, float32.
        second: running mean of the squared gradient, likewise.
        steps: steps that they were averaged over, for the bias correction.
    """

    first: Matrix
    second: Matrix
    steps: int


class Choice(NamedTuple):
    """One optimiser."""

    build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    """Parameter groups, each with its rate and weight decay → the optimiser."""
    read: Callable[[Entries], Moments]
    """What it holds for one parameter, as moments."""
    write: Callable[[Moments], Entries]
    """The reverse, exact up to the optimiser's own quantisation; the parameter must then be held in that way too."""


def build(
    name: str,
    parameters: Mapping[str, torch.nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    lora_plus_ratio: float = 1.0,
) -> torch.optim.Optimizer:
    """An optimiser over the trained parameters.

    Args:
        name: a name in OPTIMIZERS.
        parameters: by name; those whose name ends in `.b` learn at `lora_plus_ratio` times the rate of the others.
        learning_rate: of `a`; `set_rate` changes it.
        weight_decay: decoupled, of every parameter.
        lora_plus_ratio: at least 1; 1 is plain LoRA.

    Raises:
        ConfigError: no optimiser of that name; lists those there are.
        MissingExtraError: bitsandbytes is not installed.
    """
    split: dict[float, list[torch.nn.Parameter]] = {}
    for parameter_name, parameter in parameters.items():
        split.setdefault(lora_plus_ratio if parameter_name.endswith(".b") else 1.0, []).append(parameter)
    groups = [
        {"params": found, "lr": learning_rate * ratio, "lr_ratio": ratio, "weight_decay": weight_decay}
        for ratio, found in split.items()
    ]
    return get(name).build(groups)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give the optimiser the learning rate of `a`; that of `b` follows by its ratio."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]


def clip(parameters: Mapping[str, torch.nn.Parameter], norm: float, most: float) -> None:
    """Scale all gradients, in place, to a joint norm of at most `most`, by the factor of torch's `clip_grad_norm_`.

    Args:
        parameters: by name.
        norm: of all their gradients together, finite.
        most: greater than 0.
    """
    factor = most / (norm + 1e-6)
    if factor < 1.0:
        for parameter in parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def gradient_norms(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, float]:
    """The Frobenius norm of each gradient; one that is not finite shows that the gradient is not, or overflows."""
    found = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    # One transfer for all, where they live on a card.
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in found.values()]).tolist()
    return dict(zip(found, norms, strict=True))


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    fused = all(parameter.device.type in FUSED for group in groups for parameter in group["params"])
    # Neither fused nor told so, torch updates all parameters at once, and holds 8 bytes for each number more.
    return torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON, fused=fused, foreach=False)


def _bitsandbytes() -> Any:
    try:
        with quiet():
            import bitsandbytes  # noqa: PLC0415 - whoever trains with plain AdamW need not have it
    except ModuleNotFoundError as missing:
        raise missing_extra(missing.name or "bitsandbytes", "client") from missing
    return bitsandbytes


def _adamw_8bit(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = _bitsandbytes().optim.AdamW8bit(groups, betas=BETAS, eps=EPSILON)
    return made


def _read_32bit(first: str, second: str) -> Callable[[Entries], Moments]:
    return lambda held: Moments(held[first], held[second], int(held["step"]))


def _write_adamw(moments: Moments) -> Entries:
    steps = np.array(moments.steps, np.float32)
    return {"step": steps, "exp_avg": moments.first, "exp_avg_sq": moments.second}


def _read_8bit(held: Entries) -> Moments:
    if "absmax1" not in held:
        return _read_32bit("state1", "state2")(held)
    functional = _bitsandbytes().functional

    def whole(number: int) -> Matrix:
        codes, scales, values = (torch.from_numpy(held[f"{part}{number}"]) for part in ("state", "absmax", "qmap"))
        found: Matrix = functional.dequantize_blockwise(codes, absmax=scales, code=values, blocksize=BLOCK).numpy()
        return found

    return Moments(whole(1), whole(2), int(held["step"]))


def _write_8bit(moments: Moments) -> Entries:
    steps = np.array(moments.steps, np.int64)
    if moments.first.size < LEAST_8BIT:
        return {"step": steps, "state1": moments.first, "state2": moments.second}
    functional = _bitsandbytes().functional
    held: dict[str, Array] = {"step": steps}
    for number, values, signed in ((1, moments.first, True), (2, moments.second, False)):
        code = functional.create_dynamic_map(signed=signed)
        codes, state = functional.quantize_blockwise(torch.from_numpy(values), code=code, blocksize=BLOCK)
        held |= {
            f"state{number}": codes.numpy(),
            f"absmax{number}": state.absmax.numpy(),
            f"qmap{number}": code.numpy(),
        }
    return held


LEAST_8BIT = 4096
"""Numbers of a tensor from which on its moments are kept in 8 bits; the default of bitsandbytes."""

OPTIMIZERS: dict[str, Choice] = {
    "adamw": Choice(_adamw, _read_32bit("exp_avg", "exp_avg_sq"), _write_adamw),
    "adamw_8bit": Choice(_adamw_8bit, _read_8bit, _write_8bit),
}


def get(name: str) -> Choice:
    """The optimiser of that name.

    Raises:
        ConfigError: no optimiser of that name; lists those there are.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(unknown_name("optimizer", name, OPTIMIZERS))
    return OPTIMIZERS[name]
