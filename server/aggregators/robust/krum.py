"""Krum: only the update that lies closest to its n - f - 2 nearest neighbours is merged.

    score(k) = sum of the n - f - 2 smallest ||D_k - D_j||^2,   j != k

Source: Blanchard, El Mhamdi, Guerraoui and Stainer, "Machine Learning with Adversaries: Byzantine Tolerant Gradient
Descent", NeurIPS 2017.

Differs from the paper: distances are between products of unequal rank (`geometry`), not between vectors of parameters,
so a device cannot look near, or far, by another factorisation of the same product.

Bears f of n >= 2 f + 3 devices: the chosen increment is within sqrt(n - f - 2) times the largest distance between two
honest ones of some honest one, whatever the others send.

Cost: that of `geometry`, and O(n^2 log n).
"""

from __future__ import annotations

import numpy as np

from server.aggregators.robust.geometry import Increments, Wide, squared_distances
from server.aggregators.robust.rule import Rule, Verdict, minority


def krum(*, byzantine: int = 1) -> Rule:
    """The one update in the middle.

    Args:
        byzantine: f, devices of a round that may send anything.

    Raises:
        ValueError: f is not a whole number of 0 or more.
    """
    f = minority(byzantine)
    return Rule(lambda found: keep_best(found, f, 1), 2 * f + 3, 2 * f + 1)


def scores(found: Increments, f: int) -> Wide:
    """(n,) the sum of each device's n - f - 2 smallest squared distances; infinite where it shares too few layers."""
    apart = squared_distances(found)
    np.fill_diagonal(apart, np.inf)
    nearest = np.sort(apart, axis=1)[:, : len(found.clients) - f - 2]
    return np.asarray(nearest.sum(axis=1))


def keep_best(found: Increments, f: int, kept: int) -> Verdict:
    """The verdict that keeps the devices of the lowest scores; of equal ones those whose names come first."""
    judged = scores(found, f)
    order = np.argsort(judged, kind="stable")
    worst = judged[order[kept - 1]]
    excluded = {}
    for index in order:
        if index in order[:kept] and np.isfinite(judged[index]):
            continue
        excluded[found.clients[index]] = (
            f"its score is {judged[index]:.3g}, and the {kept} best have up to {worst:.3g}"
            if np.isfinite(judged[index])
            else "it shares no layer with enough others to be compared"
        )
    return Verdict(excluded)
