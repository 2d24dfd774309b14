"""Which examples of one optimiser step pass through the model together, so that no computation goes into padding.

First-fit decreasing: the longest example first, each into the first pack that still has room for it. At most 11/9 of
the fewest possible packs, plus 6/9 of one.

Source: G. Dósa, "The Tight Bound of First Fit Decreasing Bin-Packing Algorithm Is FFD(I) ≤ 11/9 OPT(I) + 6/9", ESCAPE
2007.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_runtime.errors import DataError

Packs = tuple[tuple[int, ...], ...]
"""Indices of examples: each pack passes through the model at once."""


def pack(lengths: Sequence[int], capacity: int) -> Packs:
    """Distribute examples over as few packs as first-fit decreasing finds.

    The fillings of the packs depend on the lengths alone, not on their order. Cost: O(examples · packs); a step has
    tens of examples, not thousands.

    Args:
        lengths: tokens of each example, at least 1.
        capacity: tokens of a pack, at most.

    Returns:
        The indices of `lengths`, each exactly once: ascending within a pack; the pack with the longest example first,
        so that memory which does not suffice is noticed early in the step.

    Raises:
        DataError: an example is longer than a pack.
    """
    if capacity < 1 or any(length < 1 for length in lengths):
        raise ValueError(f"packs and examples have at least 1 token; found {capacity=}, {min(lengths, default=1)=}")
    longest = max(lengths, default=0)
    if longest > capacity:
        raise DataError(
            f"expected examples of at most {capacity} tokens, which is what passes through the model at once; found "
            f"one of {longest}; cut the examples to {capacity} tokens, or plan for longer ones"
        )
    packs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = next((place for place, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            place = len(packs)
            packs.append([])
            room.append(capacity)
        packs[place].append(index)
        room[place] -= lengths[index]
    return tuple(tuple(sorted(members)) for members in packs)


def fill(packs: Packs, lengths: Sequence[int], capacity: int) -> float:
    """The share of the packs' capacity that examples take, above 0 and at most 1; 1 where there is no pack."""
    if not packs:
        return 1.0
    return sum(lengths[index] for members in packs for index in members) / (len(packs) * capacity)
