"""A weighted sum of products, of whatever length: one function that chooses the way by size and cost, and says which.

    in memory, narrow   exact        thin QR of both factors and the SVD of the small core, float64
    in memory, wide     sketch       a randomised range finder on the factors, until what it misses is small enough
    longer than memory  stream       chunk after chunk, cut to a cap; memory does not depend on the number of terms

Where terms nearly cancel, the first two see it and add in float64. A stream sees it within a chunk; what cancels only
over several is right to float32's rounding of the terms, and its error says so.

The same terms in the same order, with the same seed, give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np

from edge_runtime.lora.algebra import Spectrum, Wide, draw_from
from edge_runtime.lora.columns import Columns, Term, chunks, forward, magnitude
from edge_runtime.lora.leading import EXCESS, Leading, leading
from edge_runtime.lora.sketch import DOUBLE, PROBES, SHARE
from edge_runtime.lora.streaming import Partial, absorb, nothing

ROOM_BYTES = 256 << 20
"""Memory for the factors of one sum. What is computed from them takes a small part of it more."""
CAP = 1.25
"""Directions that a stream keeps, as a multiple of those wanted."""


def total(
    terms: Iterable[Term],
    count: int,
    rank: int,
    keep: int,
    *,
    seed: str,
    excess: float = EXCESS,
    room: int = ROOM_BYTES,
) -> Leading:
    """The leading directions of a weighted sum of products.

    Args:
        terms: (weight, pair), taken once and one at a time, all of one (d_out, d_in); a weight may be one number for
            each direction.
        count: directions of all terms together.
        rank: to which the sum will be cut; there the excess is judged.
        keep: directions wanted, at least `rank`; fewer come back where there are no more.
        seed: names the random draws.
        excess: relative, of the error over the optimum, that is allowed where the sum fits into the room.
        room: bytes for factors.

    Raises:
        ValueError: no term, or terms of different shapes.
    """
    begun = iter(terms)
    first = next(begun, None)
    if first is None:
        raise ValueError("cannot add an empty sequence of products")
    shape, cap = first[1].shape, max(round(CAP * keep), 1)
    capacity = max(room // (4 * sum(shape)), 2 * cap)
    taken = chunks(chain([first], begun), min(capacity, max(count, 1)))
    if count <= capacity:
        return leading(list(taken), rank, keep, seed=seed, excess=excess)
    return _streamed(taken, shape, (rank, keep, cap), seed=seed, excess=excess)


def _streamed(
    taken: Iterator[Columns], shape: tuple[int, int], widths: tuple[int, int, int], *, seed: str, excess: float
) -> Leading:
    """Chunk after chunk. Probes see all of the sum: what was left out is known better than by the sum of all cuts."""
    (d_out, d_in), (rank, keep, cap) = shape, widths
    probes, image = draw_from(f"{seed}:probes", (d_in, PROBES)), np.zeros((d_out, PROBES))
    partial, size, seen = nothing(shape), 0.0, 0
    for columns in taken:
        partial = absorb(partial, [columns], rank, cap, seed=seed, excess=excess)
        image += forward([columns], probes, np.float64)
        size, seen = math.hypot(size, magnitude([columns])), seen + columns.count
    return _finished(partial, image, probes, keep, size, f"{seen} columns in {partial.cuts} chunks, cut to {cap}")


def _finished(partial: Partial, image: Wide, probes: Wide, keep: int, size: float, why: str) -> Leading:
    whole = partial.spectrum
    kept = Spectrum(whole.u[:, :keep], whole.s[:keep], whole.vt[:keep])
    held = kept.u @ (kept.s[:, None] * (kept.vt @ probes))
    shown = image - held
    lacking = float(np.linalg.norm(shown)) / math.sqrt(PROBES)
    cut = partial.bound + float(np.linalg.norm(whole.s[keep:]))
    rounding = 16 * DOUBLE * size
    bound = min(lacking / math.sqrt(SHARE), cut)
    # What earlier cuts left out need not be orthogonal to what is kept; where terms cancel, it is the opposite of it.
    norm = math.sqrt(max(float(np.sum(kept.s**2) + 2 * np.sum(held * shown) / PROBES) + lacking**2, 0.0))
    return Leading(kept, norm, min(lacking, bound), bound, rounding, "stream", why)
