"""How many directions of which layer a device trains, within what one rank for all would take: by the spectrum.

    max Σ_l Σ_{i <= r_l} σ²_{l,i}   subject to   Σ_l r_l (d_out + d_in)_l  <=  Σ_l r (d_out + d_in)_l

Singular values fall, so the greedy choice (each next direction where it holds most energy for a number) is the optimum
up to the last direction that still fits: water-filling on σ². A device reads the spectrum off what it received anyway,
`a` = c vᵀ and `b` = u s / c, so nothing travels. Why the device decides and not the server: docs/decisions/0013.

Source of the idea that layers need unequal ranks: AdaLoRA (Zhang et al., ICLR 2023, arXiv 2303.10512). Differs from
it: the importance is the energy of what the whole fleet has learnt, not a running mean of one device's gradients.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edge_runtime.lora.adapter import Pair, Slot

Spectra = Mapping[str, NDArray[np.float64]]
"""Layer → singular values of the directions that are held, falling."""

UNIFORM, SPECTRUM = "uniform", "spectrum"
ALLOCATIONS = (UNIFORM, SPECTRUM)

LEAST = 0.25
"""Share of its planned rank that a layer keeps in any case: where nothing was learnt yet, something may be."""

WORTH_IT = 0.25
"""Share by which a direction must hold more energy for a number than one that is trained already, to take its place.

It is asked of each exchange. Of all the energy that is trained, most is in the first few directions of each layer,
which no allocation gives up: against that sum hardly any exchange would seem worth it."""


def singular_values(pair: Pair) -> NDArray[np.float64]:
    """(r,): of a product whose rows of `a` and columns of `b` are each orthogonal, as the server hands them out."""
    a, b = (np.sum(np.square(factor, dtype=np.float64), axis=axis) for factor, axis in ((pair.a, 1), (pair.b, 0)))
    return np.asarray(np.sqrt(a * b), np.float64)


def ranks(slot: Slot, spectra: Spectra, before: Mapping[str, int] | None = None, *, least: int = 1) -> dict[str, int]:
    """Layer → directions to train, of the layers that the slot trains.

    The sum of trained numbers is never above the slot's, and no layer trains more than it holds. Without a spectrum,
    or where nothing more is held than trained, ranks stay as they were.

    Args:
        slot: the plan's.
        spectra: of what was received.
        before: the ranks of the round before, and at first the slot's own. A direction that they train is given up only
            for one that holds WORTH_IT more, so that ranks, and with them what the optimiser and the codec remember,
            do not change with every version.
        least: numbers that a factor keeps, where the plan had as many: with fewer, 8-bit moments are kept in 32 bits,
            and the plan's memory would not suffice.
    """
    kept = before if before is not None and _fits(before, slot) else slot.trained
    found = _filled(slot, spectra, kept, least)
    # Where sizes differ, what is left at the end may be too little for a large direction that was given up.
    return found if _energy(found, spectra) > _energy(kept, spectra) else dict(kept)


def _filled(slot: Slot, spectra: Spectra, kept: Mapping[str, int], least: int) -> dict[str, int]:
    def entry(name: str) -> tuple[float, bool, int, str]:
        rank, values = found[name], spectra[name]
        energy = float(values[rank]) ** 2 if rank < len(values) else 0.0
        new = rank >= kept[name]
        return -energy * (1.0 if new else 1 + WORTH_IT) / sum(slot.shapes[name]), new, rank, name

    found = {name: _floor(slot, name, least) for name in slot.trained}
    left = _numbers(slot.trained, slot) - _numbers(found, slot)
    # The most energy for a number first; where there is none to gain, what was trained, and then the layer with fewest.
    waiting = [entry(name) for name in found]
    heapq.heapify(waiting)
    while waiting:
        *_, name = heapq.heappop(waiting)
        size = sum(slot.shapes[name])
        if found[name] >= slot.held[name] or size > left:
            continue
        found[name], left = found[name] + 1, left - size
        heapq.heappush(waiting, entry(name))
    return found


def _floor(slot: Slot, name: str, least: int) -> int:
    planned = slot.trained[name]
    whole = -(-least // min(slot.shapes[name]))
    return min(planned, max(1, round(LEAST * planned), whole))


def _numbers(found: Mapping[str, int], slot: Slot) -> int:
    return sum(rank * sum(slot.shapes[name]) for name, rank in found.items())


def _fits(before: Mapping[str, int], slot: Slot) -> bool:
    """Whether ranks of a former round are within this slot; its plan may be another."""
    return (
        before.keys() == slot.trained.keys()
        and all(0 < rank <= slot.held[name] for name, rank in before.items())
        and _numbers(before, slot) <= _numbers(slot.trained, slot)
    )


def _energy(found: Mapping[str, int], spectra: Spectra) -> float:
    return float(sum(np.sum(np.square(spectra[name][:rank])) for name, rank in found.items()))
