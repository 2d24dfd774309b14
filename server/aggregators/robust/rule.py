"""What a robust rule is: a plain function of what the devices of a round changed. It comes in two forms.

A `Rule` judges: it sees what each device changed in the space of products, D_k = d_k (B_k A_k - R_k) with d_k its
discount, and says whom to leave out and whose word counts how much. A `Coordinatewise` rule replaces: each entry of the
merged change is what is left of the devices' entries when the outermost are trimmed, so that no device is left out or
kept as a whole. Neither knows the method that merges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from server.aggregators.robust.geometry import Increments, Wide


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
    """A robust rule that judges updates.

    Attributes:
        judge: the increments of a round → the verdict.
        least: fewest updates that it can judge.
        support: fewest devices that must have trained a layer; one that fewer trained stays as it is, because nobody
            could tell who of them is right.
    """

    judge: Callable[[Increments], Verdict]
    least: int
    support: int


class Trim(NamedTuple):
    """How the entries of one layer are trimmed.

    Attributes:
        masses: (n,) what each device counts for, positive.
        ends: devices that are trimmed at either end: a mass of `ends` times the largest. The whole must be more than
            twice that.
    """

    masses: Wide
    ends: int


class Coordinatewise(NamedTuple):
    """A robust rule that puts one change in the place of all updates, entry by entry; see `coordinates`.

    Attributes:
        trim: (n,) examples that the devices of a layer claim → how their entries are trimmed.
        least: as of a `Rule`.
        support: likewise.
    """

    trim: Callable[[Wide], Trim]
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
