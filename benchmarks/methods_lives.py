"""Runs lives of `benchmarks.methods`, those of one fleet side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.methods_fleet import Rate
from benchmarks.methods_settings import SETTINGS, WAYS

if TYPE_CHECKING:
    from benchmarks.methods_fleet import Fleet
    from benchmarks.together import Together


@dataclass(frozen=True)
class Order:
    """One life to be run."""

    setting: str
    way: str
    seed: int
    rate: float
    exponent: float
    rounds: int
    steps: int
    whole: bool = True

    @property
    def of(self) -> Rate:
        """How fast its devices learn."""
        return Rate(self.rate, self.exponent)

    @property
    def key(self) -> str:
        """Names it among those that are kept."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Place:
    """Where the texts, the encoder and the causal model are, what computes, in torch's words, and where it may keep."""

    data: Path
    encoder: str
    device: str
    model: str = "smollm2"
    keep: Path | None = None


def live(place: Place, orders: Sequence[Order]) -> list[dict[str, Any]]:
    """What came of lives of one fleet: one setting, one seed."""
    from benchmarks import together  # noqa: PLC0415 - the process that waits for lives needs no torch
    from benchmarks.methods_fleet import Life  # noqa: PLC0415 - as above

    fleet, engine = _fleet(place, orders[0].setting, orders[0].seed)
    lives = [
        Life(fleet, WAYS[order.way], steps=order.steps, seed=order.seed, rate=order.of).run(
            order.rounds, max(1, order.rounds // 3), whole=order.whole
        )
        for order in orders
    ]
    return [asdict(ended) for ended in together.side_by_side(lives, engine)]


@lru_cache(maxsize=1)
def _fleet(place: Place, name: str, seed: int) -> tuple[Fleet, Together]:
    """A fleet and the engine of its model: a process is mostly given lives of the same one, one after the other."""
    import torch  # noqa: PLC0415 - as above

    from benchmarks import answers_fleet, together, wire_fleet  # noqa: PLC0415 - as above
    from benchmarks.together_answers import Answers  # noqa: PLC0415 - as above
    from benchmarks.together_labels import Labels  # noqa: PLC0415 - as above

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    setting = SETTINGS[name]
    folder, ranks, alpha, device = place.data / setting.data, setting.ranks, setting.alpha, place.device
    if setting.causal:
        learning = answers_fleet.build(folder, seed, ranks, alpha=alpha, model=place.model, device=device)
        # On a CPU devices side by side only pad each other's texts.
        return learning, together.Together(Answers(learning, device, place.keep), 1 if device == "cpu" else 64)
    fleet = wire_fleet.build(folder, seed, ranks, alpha=alpha, encoder=place.encoder, device=device)
    return fleet, together.Together(Labels(fleet, device))
