"""Does the artefact compute what the live model computes? Logits of both, in float32, compared.

An export that loads is not yet an export that is right: a scale lost, a rank matched to the wrong layer or a permuted
row change the answers and raise no error. So every format is read back by its own reader and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.errors import ExportError
from edge_runtime.lora.native import read_native_folder
from edge_runtime.train.base import PreparedBase, load
from edge_runtime.train.convert import precision_named
from edge_runtime.train.live import LiveModel
from export.float32 import in_float32
from export.native import into_model
from profiles.light_import import light_import

Logits = NDArray[np.float32]

TOLERANCE = 1e-4
"""Largest difference of a logit that float32 arithmetic in another order explains."""

PROMPTS = (
    "The capital of France is",
    'def mean(values):\n    """Return the arithmetic mean of',
    "Write one sentence about the sea.",
)
"""Texts to compare on where a caller has none of its own."""


@dataclass(frozen=True)
class Parity:
    """How far two models agree on the same tokens.

    Attributes:
        max_abs: largest absolute difference of a logit.
        effect: largest absolute change that the adapter makes to a logit: an agreement means little without one.
        same_top: share of positions with the same most likely next token.
        positions: positions compared.
    """

    max_abs: float
    effect: float
    same_top: float
    positions: int


def encode(tokenizer: Any, texts: Sequence[str] = PROMPTS) -> tuple[tuple[int, ...], ...]:
    """Token ids of texts, without the special tokens that some tokenizers add."""
    return tuple(tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts)


def logits(model: Any, prompts: Sequence[Sequence[int]]) -> Logits:
    """The logits after every token of every prompt, each prompt alone.

    Args:
        model: a causal language model of transformers, wrapped by PEFT or not; its mode is left as it was.
        prompts: token ids.

    Returns:
        (tokens of all prompts, vocabulary), float32, in the precision that the model computes in.
    """
    was_training = model.training
    device = model.get_input_embeddings().weight.device
    model.eval()
    try:
        with torch.no_grad():
            # PEFT returns those of virtual tokens too, before the others.
            found = [
                model(input_ids=torch.tensor([list(prompt)], device=device)).logits[0, -len(prompt) :]
                for prompt in prompts
            ]
    finally:
        model.train(was_training)
    rows: Logits = torch.cat(found).float().cpu().numpy()
    return rows


def live_logits(live: LiveModel, prompts: Sequence[Sequence[int]]) -> Logits:
    """The logits of the live model, adapter included, computed in float32 whatever precision it trains in."""
    with in_float32(live.model):
        return logits(live.model, prompts)


def parity(live: Logits, fresh: Logits, base: Logits) -> Parity:
    """Compare the logits of the live model, of the artefact and of the base model alone.

    Raises:
        ExportError: logits of different shapes, or a number that is not finite.
    """
    if not live.shape == fresh.shape == base.shape:
        raise ExportError(f"expected logits of equal shapes, found {live.shape}, {fresh.shape} and {base.shape}")
    if not (np.isfinite(live).all() and np.isfinite(fresh).all()):
        raise ExportError("expected finite logits of the live model and the artefact, found some that are not")
    return Parity(
        max_abs=float(np.max(np.abs(live - fresh))),
        effect=float(np.max(np.abs(live - base))),
        same_top=float(np.mean(live.argmax(axis=1) == fresh.argmax(axis=1))),
        positions=int(live.shape[0]),
    )


def verify_native(
    folder: Path, prepared: PreparedBase, prompts: Sequence[Sequence[int]], live: Logits, *, device: str = "cpu"
) -> Parity:
    """The same of the runtime's own format; arguments and errors as of `verify_peft`."""
    base, plain = _base(prepared, prompts, device)
    fresh = into_model(base, read_native_folder(folder))
    with in_float32(fresh.model):
        return parity(live, logits(fresh.model, prompts), plain)


def verify_peft(
    folder: Path, prepared: PreparedBase, prompts: Sequence[Sequence[int]], live: Logits, *, device: str = "cpu"
) -> Parity:
    """Load a PEFT folder with PEFT onto a fresh base model and compare it with the live model.

    Args:
        folder: as `export.peft.export` wrote it.
        prepared: the base model that the live model was loaded from.
        prompts: token ids; the same that `live` was computed on.
        live: from `live_logits`.
        device: where the fresh model computes.

    Raises:
        ExportError: PEFT cannot load the folder, or its logits are of another shape or not finite.
        BaseModelError: the base model cannot be loaded.
    """
    base, plain = _base(prepared, prompts, device)
    # Only here: training needs no PEFT, and should not have it in memory.
    peft = light_import("peft")
    try:
        fresh = peft.PeftModel.from_pretrained(base, folder)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ExportError(f"expected PEFT to load '{folder}'; found: {str(error).strip().splitlines()[0]}") from error
    with in_float32(fresh):
        return parity(live, logits(fresh, prompts), plain)


def _base(prepared: PreparedBase, prompts: Sequence[Sequence[int]], device: str) -> tuple[Any, Logits]:
    """A fresh base model and its logits."""
    # As narrow as it may compute: `in_float32` widens what it needs while it needs it.
    narrow = "bf16" in precision_named(prepared.precision).compute
    base = load(prepared, compute_dtype="bf16" if narrow else "fp32", device=device).model
    with in_float32(base):
        return base, logits(base, prompts)


VERIFIERS: Mapping[str, Callable[..., Parity]] = {"peft": verify_peft, "native": verify_native}
"""Format → how an artefact of it is read back; the arguments are those of `verify_peft`."""
