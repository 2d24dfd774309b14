"""How updates of unequal rank become one global adapter: ONE FILE = ONE METHOD, and this literal table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from edge_runtime.errors import ConfigError, unknown_name
from server.aggregators.increment import increment
from server.aggregators.layers import Engine, local
from server.aggregators.method import Aggregator
from server.aggregators.robust import ROBUST
from server.aggregators.robust.guarding import guarded
from server.aggregators.svd import svd
from server.aggregators.zero_pad import zero_pad

METHODS: Mapping[str, Callable[..., Aggregator]] = {
    "increment": increment,
    "svd": svd,
    "zero_pad": zero_pad,
}


def build(method: str, engine: Engine = local, /, *, robust: str | None = None, **parameters: Any) -> Aggregator:
    """The method of that name behind the robust rule of that name, straight from the `[aggregator]` table.

    Args:
        method: see METHODS.
        engine: merges its layers.
        robust: see ROBUST; None for no rule.
        parameters: of the rule, where it takes one of that name; of the method otherwise.

    Raises:
        ConfigError: no such method or rule (lists those there are), a parameter neither takes, or a bad value.
    """
    if method not in METHODS:
        raise ConfigError(unknown_name("aggregation method", method, METHODS))
    if robust is not None and robust not in ROBUST:
        raise ConfigError(unknown_name("robust rule", str(robust), ROBUST))
    taken = inspect.signature(ROBUST[robust]).parameters if robust else {}
    try:
        merging = METHODS[method](engine, **{name: value for name, value in parameters.items() if name not in taken})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"[aggregator] method '{method}': {error}") from error
    if robust is None:
        return merging
    try:
        rule = ROBUST[robust](**{name: value for name, value in parameters.items() if name in taken})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"[aggregator] robust rule '{robust}': {error}") from error
    return guarded(merging, robust, rule)
