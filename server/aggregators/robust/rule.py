"""What a robust rule is: a plain function from the increments of a round to a verdict on them.

A rule knows nothing of the method that merges: it sees what each device changed in the space of products,
D_k = d_k (B_k A_k - R_k) with d_k its discount, and says whom to leave out and whose word counts how much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from server.aggregators.robust.geometry import Increments


@dataclass(frozen=True)
class Verdict:
    """What a rule makes of a round.

    Attributes:
        excluded: client → why its update is left out.
        scales: client → what its increment is multiplied by; 1 for whom it does not name.
        weights: client → its weight, in the place of the examples it claims; empty where those stand.
    """

    excluded: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)


class Rule(NamedTuple):
    """A robust rule.

    Attributes:
        judge: the increments of a round → the verdict.
        least: fewest updates that it can judge.
        support: fewest devices that must have trained a layer; one that fewer trained stays as it is, because nobody
            could tell who of them is right.
    """

    judge: Callable[[Increments], Verdict]
    least: int
    support: int


def minority(byzantine: object) -> int:
    """The number of bad devices that a rule is asked to bear.

    Raises:
        ValueError: not a whole number of 0 or more.
    """
    if isinstance(byzantine, bool) or not isinstance(byzantine, int) or byzantine < 0:
        raise ValueError(f"aggregator.byzantine must be a whole number of devices, 0 or more; found {byzantine!r}")
    return byzantine
