"""What an export is about, and what an exported artefact must be able to do once it is open in its own engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.lora.adapter import Adapter

if TYPE_CHECKING:
    # Its module imports torch, and whoever writes an adapter alone has none.
    from edge_runtime.train.base import PreparedBase

Logits = NDArray[np.float32]
"""(tokens, vocabulary), float32."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What leaves: an adapter and the base model that it belongs to.

    Attributes:
        adapter: a personal or a global one; the scale is folded into b, as everywhere.
        scaling: PEFT's lora_alpha / r, to unfold with.
        base_name: as a person or a hub names the base model.
        prepared: the base model itself; None where no format chosen needs it.
        family: what kind of adapter it is: a key of `profiles.families.FAMILIES`.
    """

    adapter: Adapter
    scaling: float
    base_name: str
    prepared: PreparedBase | None
    family: str = "lora"


class Engine(Protocol):
    """An exported artefact, open in the engine that devices run."""

    def logits(self, tokens: Sequence[int]) -> Logits:
        """The logits after each token of one prompt: (len(tokens), vocabulary), float32."""
        ...

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The next `count` tokens of the highest logit, with the engine's own cache."""
        ...

    def close(self) -> None:
        """Give the engine's memory back; the engine must not be used afterwards."""
        ...
