"""A method behind a robust rule: the method merges what the rule leaves, or what it puts in the place of all updates.

Works with every method. All updates of a layer are in memory at once: a rule compares each with each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from edge_runtime.errors import AggregationError
from server.aggregators.method import Aggregator, Merged, State, Update, by_layer
from server.aggregators.robust.coordinates import replaced
from server.aggregators.robust.form import scaled
from server.aggregators.robust.geometry import increments
from server.aggregators.robust.rule import Coordinatewise, Rule, Verdict


def guarded(method: Aggregator, name: str, rule: Rule | Coordinatewise) -> Aggregator:
    """The method that merges only what the rule lets through.

    Its `combine` raises AggregationError where fewer updates can be judged than the rule needs, or none is left.

    Args:
        method: any.
        name: of the rule, for errors.
        rule: see `server.aggregators.robust.ROBUST`.
    """

    def combine(state: State, updates: Iterable[Update]) -> Merged:
        ordered = sorted(updates, key=lambda update: update.client)
        by_layer(state, ordered)  # raises for what does not fit
        found, excluded = _comparable(ordered, rule.support)
        if len(found) < rule.least:
            raise AggregationError(
                f"the robust rule '{name}' needs {rule.least} updates that can be compared; found {len(found)} of "
                f"{len(ordered)}; raise [rounds] min_available_nodes and quorum, or lower [aggregator] byzantine"
            )
        if isinstance(rule, Coordinatewise):
            merged = replaced(method, state, found, name, rule)
        else:
            verdict = rule.judge(increments(found))
            excluded |= verdict.excluded
            left = [_judged(method, update, verdict) for update in found if update.client not in excluded]
            if not left:
                reasons = "; ".join(f"'{client}': {why}" for client, why in sorted(excluded.items()))
                raise AggregationError(f"the robust rule '{name}' leaves none of {len(ordered)} updates: {reasons}")
            merged = method.combine(state, left)
        return replace(merged, excluded={**excluded, **merged.excluded})

    return method._replace(combine=combine, least=max(method.least, rule.least))


def _comparable(updates: Sequence[Update], support: int) -> tuple[list[Update], dict[str, str]]:
    """The updates with the layers that enough devices trained, and why others are left out."""
    finite, excluded = [], {}
    for update in updates:
        if _finite(update):
            finite.append(update)
        else:
            excluded[update.client] = "its numbers are not finite"
    counts = Counter(name for update in finite for name in update.trained)
    found = []
    for update in finite:
        layers = update.trained.only(name for name in update.trained if counts[name] >= support)
        if layers:
            found.append(replace(update, trained=layers))
        else:
            excluded[update.client] = f"it has no layer that {support} devices trained, so nobody can judge it"
    return found, excluded


def _finite(update: Update) -> bool:
    return all(bool(np.isfinite(pair.a).all() and np.isfinite(pair.b).all()) for pair in update.trained.values())


def _judged(method: Aggregator, update: Update, verdict: Verdict) -> Update:
    if verdict.weights:
        update = replace(update, weight=verdict.weights[update.client], weights={})
    return scaled(method, update, verdict.scales.get(update.client, 1.0))
