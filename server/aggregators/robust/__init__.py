"""Robust rules in the space of products, over any method: ONE FILE = ONE RULE, and this literal table."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from server.aggregators.robust.clip import clip
from server.aggregators.robust.geometric_median import geometric_median
from server.aggregators.robust.krum import krum
from server.aggregators.robust.multi_krum import multi_krum
from server.aggregators.robust.rule import Rule

ROBUST: Mapping[str, Callable[..., Rule]] = {
    "clip": clip,
    "geometric_median": geometric_median,
    "krum": krum,
    "multi_krum": multi_krum,
}
