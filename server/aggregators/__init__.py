"""How updates of unequal rank become one global adapter: ONE FILE = ONE METHOD, and this literal table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from edge_runtime.errors import ConfigError, unknown_name
from server.aggregators.increment import increment
from server.aggregators.layers import Engine, local
from server.aggregators.method import Aggregator
from server.aggregators.optimizers import OPTIMIZERS, optimised
from server.aggregators.robust import ROBUST
from server.aggregators.robust.guarding import guarded
from server.aggregators.svd import svd
from server.aggregators.zero_pad import zero_pad

METHODS: Mapping[str, Callable[..., Aggregator]] = {
    "increment": increment,
    "svd": svd,
    "zero_pad": zero_pad,
}


def build(
    method: str,
    engine: Engine = local,
    /,
    *,
    robust: str | None = None,
    optimizer: str | None = None,
    **parameters: Any,
) -> Aggregator:
    """The method behind a robust rule and under a server optimiser, straight from the `[aggregator]` table.

    Args:
        method: see METHODS.
        engine: merges its layers.
        robust: see ROBUST; None for no rule.
        optimizer: see OPTIMIZERS; None for the method's own steps.
        parameters: of the rule or the optimiser, where it takes one of that name; of the method otherwise.

    Raises:
        ConfigError: no such method, rule or optimiser (lists those there are), a parameter that none of them takes, or
            a bad value.
    """
    parts: list[tuple[str, str, Mapping[str, Callable[..., Any]]]] = []
    if robust is not None:
        parts.append(("robust rule", robust, ROBUST))
    if optimizer is not None:
        parts.append(("server optimizer", optimizer, OPTIMIZERS))
    rest, built = dict(parameters), dict[str, Any]()
    for kind, name, table in (*parts, ("method", method, METHODS)):
        if name not in table:
            raise ConfigError(unknown_name("aggregation method" if kind == "method" else kind, str(name), table))
        taken = set(rest) if kind == "method" else set(rest) & set(inspect.signature(table[name]).parameters)
        own = {key: rest.pop(key) for key in taken}
        try:
            built[kind] = table[name](*([engine] if kind == "method" else []), **own)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"[aggregator] {kind} '{name}': {error}") from error
    merging: Aggregator = built["method"]
    if robust is not None:
        merging = guarded(merging, robust, built["robust rule"])
    return merging if optimizer is None else optimised(merging, built["server optimizer"])
