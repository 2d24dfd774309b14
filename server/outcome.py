"""A merge as the service performs it: seen to be possible, tried, and said to people. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from edge_runtime.config import Rounds
from edge_runtime.errors import AggregationError, ConfigError
from edge_runtime.wire.messages import Offer, Rejected
from server import state as rounds
from server.aggregators.method import Aggregator, Merged, State, Update
from server.choosing import first_needed
from server.one_thread import one_thread


def attempt(method: Aggregator, state: State, updates: Iterable[Update]) -> Merged | AggregationError:
    """The merge, or why the method refuses these updates: the round then closes with the version it began with."""
    try:
        # The products are thin: BLAS threads gain nothing, and on busy cores they wait for each other (decision 0004).
        with one_thread():
            return method.combine(state, updates)
    except AggregationError as error:
        return error


def check_least(method: Aggregator, asked: Rounds) -> None:
    """See at the start whether a round of the smallest fleet can be merged at all.

    Args:
        method: of the fleet.
        asked: the rounds of the fleet's file.

    Raises:
        ConfigError: the method needs more updates than that.
    """
    available = first_needed(asked)
    if available < method.least:
        raise ConfigError(
            f"[aggregator] needs {method.least} updates a round; [rounds] min_available_nodes, fraction_train and, in "
            f"buffered mode, buffer_size begin with {available}; raise them, or lower [aggregator] byzantine"
        )


def stored(offer: Offer, norm: float, state: rounds.State) -> Mapping[str, Any]:
    """What is written down of an update that was stored in this state, and moves the model by `norm`."""
    return {
        "event": "update", "round": state.round, "client": offer.client, "bytes": offer.blob.size,
        "examples": offer.examples, "loss_first": offer.loss_first, "loss_last": offer.loss_last, "norm": norm,
        "age": state.version - offer.version,
    }  # fmt: skip


def corrupt(offer: Offer, error: Exception) -> Rejected:
    """What is told to whoever sent what is no update."""
    return Rejected(code="corrupt", reason=str(error)[:1024], sha256=offer.blob.sha256)


def said(number: int, version: int, merged: Merged) -> list[str]:
    """The same for people: one line, and one for each update that was left out."""
    first = f"round {number}: merged into version {version}, truncation error {merged.truncation:.2%}"
    return [first, *(f"round {number}: left out '{name}': {why}" for name, why in sorted(merged.excluded.items()))]
