"""How updates of unequal rank become one global adapter: ONE FILE = ONE METHOD, and this literal table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edge_runtime.errors import ConfigError, unknown_name
from server.aggregators.increment import increment
from server.aggregators.layers import Engine, local
from server.aggregators.method import Aggregator
from server.aggregators.svd import svd
from server.aggregators.zero_pad import zero_pad

METHODS: Mapping[str, Callable[..., Aggregator]] = {
    "increment": increment,
    "svd": svd,
    "zero_pad": zero_pad,
}


def build(method: str, engine: Engine = local, /, **parameters: Any) -> Aggregator:
    """The method of that name with its parameters, straight from the `[aggregator]` table; `engine` merges its layers.

    Raises:
        ConfigError: no such method (lists those there are), a parameter it does not take, or a bad value.
    """
    if method not in METHODS:
        raise ConfigError(unknown_name("aggregation method", method, METHODS))
    try:
        return METHODS[method](engine, **parameters)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"[aggregator] method '{method}': {error}") from error
