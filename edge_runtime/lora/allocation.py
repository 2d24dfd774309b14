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

WORTH_IT = 0.05
"""Share by which the energy in the trained directions must grow for the ranks to change."""


def singular_values(pair: Pair) -> NDArray[np.float64]:
    """(r,): of a product whose rows of `a` and columns of `b` are each orthogonal, as the server hands them out."""
    a, b = (np.sum(np.square(factor, dtype=np.float64), axis=axis) for factor, axis in ((pair.a, 1), (pair.b, 0)))
    return np.asarray(np.sqrt(a * b), np.float64)


def ranks(slot: Slot, spectra: Spectra, before: Mapping[str, int] | None = None, *, least: int = 1) -> dict[str, int]:
    """Layer → directions to train, of the layers that the slot trains.

    The sum of trained numbers is never above the slot's, and no layer trains more than it holds. Without a spectrum,
    or where nothing more is held than trained, the slot's own ranks come back.

    Args:
        slot: the plan's.
        spectra: of what was received.
        before: the ranks of the round before. They stay unless others hold WORTH_IT more energy, so that ranks, and
            with them what the optimiser and the codec remember, do not change with every version.
        least: numbers that a factor keeps, where the plan had as many: with fewer, 8-bit moments are kept in 32 bits,
            and the plan's memory would not suffice.
    """
    if all(not spectra[name].any() for name in slot.trained):
        return dict(slot.trained)
    found = _filled(slot, spectra, least)
    held = _energy(found, spectra)
    kept = before if before is not None and _fits(before, slot) else slot.trained
    return found if held > (1 + WORTH_IT) * _energy(kept, spectra) else dict(kept)


def _filled(slot: Slot, spectra: Spectra, least: int) -> dict[str, int]:
    found = {name: _floor(slot, name, least) for name in slot.trained}
    left = _numbers(slot.trained, slot) - _numbers(found, slot)
    # The most energy for a number first; where there is none to gain, the layer that has fewest directions.
    waiting = [_entry(name, found[name], spectra, slot) for name in found]
    heapq.heapify(waiting)
    while waiting:
        _, rank, name = heapq.heappop(waiting)
        size = sum(slot.shapes[name])
        if rank >= slot.held[name] or size > left:
            continue
        found[name], left = rank + 1, left - size
        heapq.heappush(waiting, _entry(name, rank + 1, spectra, slot))
    return found


def _entry(name: str, rank: int, spectra: Spectra, slot: Slot) -> tuple[float, int, str]:
    values = spectra[name]
    energy = float(values[rank]) ** 2 if rank < len(values) else 0.0
    return -energy / sum(slot.shapes[name]), rank, name


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
