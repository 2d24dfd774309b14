"""Robust rules in the space of products, over any method: ONE FILE = ONE RULE, and this literal table."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from server.aggregators.robust.clip import clip
from server.aggregators.robust.geometric_median import geometric_median
from server.aggregators.robust.krum import krum
from server.aggregators.robust.median import median
from server.aggregators.robust.multi_krum import multi_krum
from server.aggregators.robust.rule import Coordinatewise, Rule
from server.aggregators.robust.trimmed_mean import trimmed_mean

ROBUST: Mapping[str, Callable[..., Rule | Coordinatewise]] = {
    "clip": clip,
    "geometric_median": geometric_median,
    "krum": krum,
    "median": median,
    "multi_krum": multi_krum,
    "trimmed_mean": trimmed_mean,
}
