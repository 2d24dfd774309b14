"""A quantised base with the leading directions of what each layer lost beside it: made once, where a base is prepared.

    y = Q(W) x + b (a x) + bias,     b a ≈ W - Q(W)

Devices of one fleet may have bases of unlike precision. An adapter over Q(W) learns a part of W - Q(W) beside its task,
and the global adapter would bring that to devices whose bases lost nothing. What is regained here is part of the base:
it is frozen, never trained, never sent, and no adapter has it.

Whoever prepares a base has W, and nobody else does for certain: so it is made then, and lies in the same folder, which
can be copied to a device that has neither W nor the memory for it. How large the inputs of the layers are is looked up
on docstrings of the standard library: a folder that is copied must have nothing in it of what a device's owner wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from edge_runtime.errors import BaseModelError, missing_extra
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.train import stdlib_docs
from edge_runtime.train.checkpoint import Checkpoint
from edge_runtime.train.lean import lean
from edge_runtime.train.lora_linear import OPENERS, REGAINED, frozen_product, opened_weight
from edge_runtime.train.lost import leading
from profiles.memory import REGAINABLE

try:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file
except ModuleNotFoundError as missing:
    raise missing_extra(missing.name or "torch", "client") from missing

FILE = "regained.safetensors"
GROUP, TEXTS, TOKENS = "text", 16, 128
"""So many docstrings of that group are looked at, and so many tokens of each at most."""
_TENSORS = 3
"""Of the size of the largest weight, in float32, while its error is decomposed."""
WORKING_BYTES = 64 << 20
"""Memory of activations and thin factors, rounded up."""


def regained_at(precision: str, asked: int) -> int:
    """Of so many directions as a fleet asks for, those of a base of that precision: none where nothing was lost."""
    return asked if precision in REGAINABLE else 0


def check_precision(precision: str, regained: int) -> None:
    """Whether a base of that precision has lost anything that could be regained.

    Raises:
        BaseModelError: it has not; says which have.
    """
    if regained and precision not in REGAINABLE:
        raise BaseModelError(
            f"expected a base of precision {' or '.join(REGAINABLE)} to regain {regained} directions of; found "
            f"{precision}, which loses next to nothing; regain none of it"
        )


def check_memory(checkpoint: Checkpoint, folder: Path, memory_bytes: int) -> None:
    """Whether there is room to make what is regained of a converted base.

    Raises:
        BaseModelError: too little memory; says what would help.
    """
    matrices = [name for name in checkpoint.names if len(checkpoint.shape(name)) == 2]
    vocabulary = checkpoint.config.get("vocab_size")
    sizes = [int(np.prod(shape)) for shape in map(checkpoint.shape, matrices) if shape[0] != vocabulary]
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    largest = _TENSORS * 4 * max(sizes, default=0)
    needed = psutil.Process().memory_info().rss + weights + largest + WORKING_BYTES
    if needed > memory_bytes:
        raise BaseModelError(
            f"expected {needed >> 20} MiB of memory to regain what this base lost; found {memory_bytes >> 20} MiB; "
            "run `edge-runtime prepare` with --regained on a larger machine, copy the folder that it names to this "
            "device, and give the copy as --base"
        )


def write(model: Any, tokenizer: Any, checkpoint: Checkpoint, folder: Path, rank: int) -> Path:
    """Write the leading directions of what each quantised layer of a model lost.

    Args:
        model: the quantised base, loaded.
        tokenizer: its own.
        checkpoint: what it was converted from.
        folder: of the prepared base.
        rank: directions of each layer.

    Returns:
        A safetensors file of `<layer>.a` (rank, d_in) and `<layer>.b` (d_out, rank) in bfloat16.
    """
    layers = _quantised(model)
    sizes = _input_sizes(model, layers, _texts(tokenizer))
    factors: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        lost = opened_weight(layer).neg()
        for at, rows in checkpoint.pieces(f"{name}.weight"):
            lost[at] += rows.float()
        a, b = leading(lost, rank, sizes[name])
        factors |= {f"{name}.a": a.to(torch.bfloat16).contiguous(), f"{name}.b": b.to(torch.bfloat16).contiguous()}
    save_file(factors, folder / FILE)
    return folder / FILE


def attach(model: Any, folder: Path) -> None:
    """Put what `write` wrote beside the layers of a model that was loaded from the same folder; they keep it for good.

    Raises:
        BaseModelError: a layer without directions, or of another shape.
    """
    with safe_open(folder / FILE, framework="pt") as file:
        names = set(file.keys())
        for name, layer in _quantised(model).items():
            if not {f"{name}.a", f"{name}.b"} <= names:
                raise BaseModelError(f"expected directions of '{name}' in {folder / FILE}; found none; prepare it anew")
            a, b = (file.get_tensor(f"{name}.{factor}").to(layer.weight.device) for factor in "ab")
            if (b.shape[0], a.shape[1]) != (layer.out_features, layer.in_features):
                raise BaseModelError(
                    f"expected directions of shape {(layer.out_features, layer.in_features)} for '{name}' in "
                    f"{folder / FILE}; found {(b.shape[0], a.shape[1])}; prepare it anew"
                )
            # No parameters: nothing that counts, casts or saves those shall find them.
            setattr(layer, REGAINED, (a, b))
            layer.forward = partial(frozen_product, layer)


def stacked(adapter: Adapter, folder: Path) -> Adapter:
    """An adapter together with what is regained of a prepared base: what an engine needs whose base is quantised alike.

    An engine that has the base in 16 bits needs the adapter alone: its weights lost nothing.

    Args:
        adapter: low-rank pairs, by the layers of the base.
        folder: of the prepared base.
    """
    layers = dict(adapter.items())
    for name, pair in _pairs(folder):
        own = layers.get(name)
        layers[name] = pair if own is None else Pair(np.vstack((own.a, pair.a)), np.hstack((own.b, pair.b)))
    return Adapter(layers)


def _pairs(folder: Path) -> Iterator[tuple[str, Pair]]:
    with safe_open(folder / FILE, framework="pt") as file:
        names = sorted(key.removesuffix(".a") for key in file.keys() if key.endswith(".a"))  # noqa: SIM118 - no dict
        for name in names:
            a, b = (file.get_tensor(f"{name}.{factor}").float().numpy() for factor in "ab")
            yield name, Pair(a, b)


def _quantised(model: Any) -> dict[str, Any]:
    """The layers of a model that are kept in fewer bits than they are multiplied in."""
    return {name: module for name, module in model.named_modules() if type(module).__name__ in OPENERS}


def _texts(tokenizer: Any) -> list[list[int]]:
    pairs = stdlib_docs.doc_pairs(GROUP)
    chosen = pairs[:: max(1, len(pairs) // TEXTS)][:TEXTS]
    texts = [f"{pair.prompt}\n{pair.completion}" for pair in chosen]
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"][:TOKENS]) for text in texts]


def _input_sizes(model: Any, layers: Mapping[str, Any], texts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Layer → (d_in,) float32, the root mean square of each entry of its input."""
    squares = {name: torch.zeros(layer.in_features) for name, layer in layers.items()}
    body, device = getattr(model, model.base_model_prefix), model.get_input_embeddings().weight.device

    def watch(name: str, _: Any, given: tuple[torch.Tensor, ...]) -> None:
        # Without the first token, on which models heap up numbers of a size of their own, alike in every text.
        rows = given[0].detach().reshape(-1, given[0].shape[-1])[1:]
        squares[name] += rows.float().square().sum(0).cpu()

    with torch.no_grad(), lean(model), _watched(layers, watch):
        for text in texts:
            body(input_ids=torch.tensor([list(text)], device=device))
    seen = sum(len(text) - 1 for text in texts)
    return {name: (total / seen).sqrt() for name, total in squares.items()}


@contextmanager
def _watched(layers: Mapping[str, Any], watch: Any) -> Iterator[None]:
    hooks = [layer.register_forward_pre_hook(partial(watch, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
