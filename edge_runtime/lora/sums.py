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

from edge_runtime.lora.algebra import Spectrum, Wide, image, tail_norm
from edge_runtime.lora.columns import Columns, Term, chunks
from edge_runtime.lora.leading import EXCESS, Leading, leading
from edge_runtime.lora.sketch import PROBES, SHARE, probes_from
from edge_runtime.lora.streaming import Partial, absorb, nothing

ROOM_BYTES = 256 << 20
"""Memory for the factors of one sum. What is computed from them takes a small part of it more."""
STRETCH = 0.125
"""Chunks may be wider than the room by this share of it, all of them together: no chunk is begun for so few columns."""
CAP = 1.25
"""Directions that a stream keeps, as a multiple of those wanted."""
LOOSER = 10.0
"""A cut of a stream is allowed so many times the excess: what one step more would find is little beside what all cuts
leave out."""


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
        excess: relative, of the error over the optimum, that is allowed; ten times it in each cut where the sum does
            not fit into the room.
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
    number = max(math.ceil(count / capacity - STRETCH), 1)
    taken = chunks(chain([first], begun), max(math.ceil(count / number), 1))
    if number == 1:
        return leading(list(taken), rank, keep, seed=seed, excess=excess)
    return _streamed(taken, shape, (rank, keep, cap), seed=seed, excess=LOOSER * excess)


def _streamed(
    taken: Iterator[Columns], shape: tuple[int, int], widths: tuple[int, int, int], *, seed: str, excess: float
) -> Leading:
    """Chunk after chunk. Probes see all of the sum: what was left out is known better than by the sum of all cuts."""
    rank, keep, cap = widths
    probes = probes_from(seed, shape[1])
    partial, seen = nothing(shape, PROBES), 0
    for columns in taken:
        partial = absorb(partial, [columns], rank, cap, seed=seed, excess=excess, probes=probes)
        seen += columns.count
    return _finished(partial, probes, keep, f"{seen} columns in {partial.cuts} chunks, cut to {cap}")


def _finished(partial: Partial, probes: Wide, keep: int, why: str) -> Leading:
    whole = partial.spectrum
    kept = Spectrum(whole.u[:, :keep], whole.s[:keep], whole.vt[:keep])
    missed = partial.missed + image(whole, probes, keep)
    lacking = float(np.linalg.norm(missed)) / math.sqrt(PROBES)
    cut = partial.bound + tail_norm(whole, keep)
    bound = min(lacking / math.sqrt(SHARE), cut)
    # What earlier cuts left out need not be orthogonal to what is kept; where terms cancel, it is the opposite of it.
    both = 2 * float(np.sum(image(kept, probes) * missed)) / PROBES
    norm = math.sqrt(max(float(np.sum(kept.s**2)) + both + lacking**2, 0.0))
    return Leading(kept, norm, min(lacking, bound), bound, missed, partial.rounding, "stream", why)
