"""What every benchmark prints last: one JSON object with its figures, its goals, and whether they were met."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

Goal = tuple[str, float]

_RELATIONS: Mapping[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq,
}  # fmt: skip


def result(name: str, figures: Mapping[str, Any], goals: Mapping[str, Goal]) -> bool:
    """Print the RESULT line; returns whether all goals are met. A figure that is missing or not finite misses its goal.

    Args:
        name: of the benchmark.
        figures: what was found.
        goals: figure → relation and number.
    """
    met = all(_reached(figures.get(figure), *goal) for figure, goal in goals.items())
    told = {
        "name": name,
        "figures": dict(figures),
        "goals": {key: list(goal) for key, goal in goals.items()},
        "met": met,
    }
    print("RESULT " + json.dumps(told), flush=True)
    return met


def _reached(value: Any, relation: str, number: float) -> bool:
    return value is not None and math.isfinite(value) and _RELATIONS[relation](value, number)
