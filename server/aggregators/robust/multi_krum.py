"""Multi-Krum: the n - f updates of the lowest Krum scores are merged, with their own weights.

Source: Blanchard, El Mhamdi, Guerraoui and Stainer, "Machine Learning with Adversaries: Byzantine Tolerant Gradient
Descent", NeurIPS 2017.

Differs from the paper: as `krum` does; and the kept updates are averaged by their examples, not equally.

Bears f of n >= 2 f + 3 devices: n - f honest scores are at most (n - f - 2) D^2, with D the largest distance between
two honest increments, so each kept increment is within sqrt(n - f - 2) D of an honest one, and so is their mean within
as much of the honest ones' hull.

Cost: that of `krum`.
"""

from __future__ import annotations

from server.aggregators.robust.krum import keep_best
from server.aggregators.robust.rule import Rule, minority


def multi_krum(*, byzantine: int = 1) -> Rule:
    """All updates but the f that lie farthest out; `byzantine` is f, and refused as by `krum`."""
    f = minority(byzantine)
    return Rule(lambda found: keep_best(found, f, len(found.clients) - f), 2 * f + 3, 2 * f + 1)
