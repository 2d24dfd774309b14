"""Which layer a number that is not finite came from: asked only once a loss or a gradient was not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch


def first_bad_output(model: Any, run: Callable[[], object]) -> str:
    """Where a forward pass first gives a number that is not finite, in words that follow "first".

    A module that only passes on what it was given is not blamed: then something before it computed the number outside
    any module's output, as attention does, and the words say so.

    Args:
        model: the model that `run` passes something through.
        run: the forward pass that failed; it is done once more, without gradients.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: object, named: Mapping[str, object], output: object) -> None:
            if not found and not _finite(output):
                # Not all that is named: a mask holds -inf by right.
                came_in = _finite(inputs) and _finite(named.get("hidden_states"))
                found.append(_blame(name, module) if came_in else f"before '{name}', whose input it reaches")

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            if name:  # not the whole model: that would tell nothing
                hooks.callback(module.register_forward_hook(watch(name), with_kwargs=True).remove)
        run()
    return found[0] if found else "after the last layer, in the head or the loss"


def first_bad_gradient(model: Any, norms: Mapping[str, float], parameters: Mapping[str, torch.nn.Parameter]) -> str:
    """The first parameter, in the order of the backward pass, whose gradient has no finite norm; empty if all have.

    Args:
        model: holds the parameters in the order of its forward pass.
        norms: of each gradient.
        parameters: by the same names.
    """
    order = {id(parameter): place for place, parameter in enumerate(model.parameters())}
    bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
    return max(bad, key=lambda name: order[id(parameters[name])], default="")


def _blame(name: str, module: Any) -> str:
    bad = [own for own, parameter in module.named_parameters() if not _finite(parameter)]
    return f"in the output of '{name}'" + (f", whose '{bad[0]}' is not finite itself" if bad else "")


def _finite(value: object) -> bool:
    """Whether every floating number in a tensor, or in tensors within sequences and mappings, is finite."""
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(map(_finite, value.values()))
    return not isinstance(value, (tuple, list)) or all(map(_finite, value))
