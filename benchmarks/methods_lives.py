"""Runs lives of `benchmarks.methods`, those of one fleet side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.methods_fleet import Rate
from benchmarks.methods_settings import SETTINGS, WAYS


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
    """Where the texts and the encoder are, and what computes, in torch's words."""

    data: Path
    encoder: str
    device: str


def live(place: Place, orders: Sequence[Order]) -> list[dict[str, Any]]:
    """What came of lives of one fleet: one setting, one seed."""
    import torch  # noqa: PLC0415 - the process that waits for lives needs none of it

    from benchmarks import together, wire_fleet  # noqa: PLC0415 - as above
    from benchmarks.methods_fleet import Life  # noqa: PLC0415 - as above

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    setting, seed = SETTINGS[orders[0].setting], orders[0].seed
    folder = place.data / setting.data
    fleet = wire_fleet.build(
        folder, seed, setting.ranks, alpha=setting.alpha, encoder=place.encoder, device=place.device
    )
    engine = together.Together(fleet, place.device)
    lives = [
        Life(fleet, WAYS[order.way], steps=order.steps, seed=seed, rate=order.of).run(
            order.rounds, max(1, order.rounds // 3), whole=order.whole
        )
        for order in orders
    ]
    return [asdict(ended) for ended in together.side_by_side(lives, engine)]
