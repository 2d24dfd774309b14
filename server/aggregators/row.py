"""What a row of the table of methods holds: the method, and what is to be known of it before it is chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from server.aggregators.method import Aggregator


class Row(NamedTuple):
    """A method of the table. What its Aggregator says by itself is not said again here.

    Attributes:
        build: (engine, **parameters) → the method.
        title: its name in the literature.
        merges: what it does with the updates of a round, in a few words.
        bias: how its merge differs from the weighted mean of products; empty where it does not.
        source: where it is from, with its arXiv number where it has one.
        state: what the server carries from round to round beside the global adapter.
        secure: whether the server needs only sums over devices, so that secure aggregation can hide each update.
        idle: whether a round in which nobody learns anything changes nothing, although devices have unequal ranks.
    """

    build: Callable[..., Aggregator]
    title: str
    merges: str
    bias: str
    source: str
    state: str = "none"
    secure: bool = False
    idle: bool = True
