"""A merge as the service performs it: tried, written down, and said to people. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from threadpoolctl import threadpool_limits

from edge_runtime.errors import AggregationError, ConfigError
from server.aggregators.method import Aggregator, Merged, State, Update


def attempt(method: Aggregator, state: State, updates: Iterable[Update]) -> Merged | AggregationError:
    """The merge, or why the method refuses these updates: the round then closes with the version it began with."""
    try:
        # The products are thin: BLAS threads gain nothing, and on busy cores they wait for each other (decision 0004).
        with threadpool_limits(1):
            return method.combine(state, updates)
    except AggregationError as error:
        return error


def check_least(method: Aggregator, available: int) -> None:
    """See at the start whether a round of the smallest fleet can be merged at all.

    Args:
        method: of the fleet.
        available: devices that the first round asks, at least.

    Raises:
        ConfigError: the method needs more updates than that.
    """
    if available < method.least:
        raise ConfigError(
            f"[aggregator] needs {method.least} updates a round; [rounds] min_available_nodes and fraction_train "
            f"begin with {available}; raise them, or lower [aggregator] byzantine"
        )


def event(number: int, version: int, merged: Merged, *, seconds: float, band_bytes: Sequence[int]) -> Mapping[str, Any]:
    """What is written down of a merge.

    Args:
        number: of the round.
        version: that it made.
        merged: its outcome.
        seconds: that it took.
        band_bytes: sizes of the version's bands.
    """
    layers = merged.layers.values()
    return {
        "event": "merge", "round": number, "version": version, "truncation": merged.truncation,
        "lost": sum(layer.lost**2 for layer in layers) ** 0.5, "norm": sum(layer.norm**2 for layer in layers) ** 0.5,
        "seconds": seconds, "band_bytes": list(band_bytes), "excluded": dict(merged.excluded),
        "layers": {name: vars(layer) for name, layer in merged.layers.items()},
    }  # fmt: skip


def said(number: int, version: int, merged: Merged) -> list[str]:
    """The same for people: one line, and one for each update that was left out."""
    first = f"round {number}: merged into version {version}, truncation error {merged.truncation:.2%}"
    return [first, *(f"round {number}: left out '{name}': {why}" for name, why in sorted(merged.excluded.items()))]
