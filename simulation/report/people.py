"""Pictures of a fleet: the plans that kinds of devices made, and who has which examples."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from simulation.report import style
from simulation.report.story import Planned, Story
from simulation.report.style import SERIES

CELLS = 60
"""Devices whose every class can be seen; the classes of a larger fleet are summed up."""


def kinds(story: Story) -> list[tuple[Planned, int]]:
    """Each plan that there is of each group, by one device of it, and how many devices made it."""
    found: dict[tuple[object, ...], Planned] = {}
    count: Counter[tuple[object, ...]] = Counter()
    for each in story.devices:
        key = each.group, each.rank, each.held, each.layers, each.precision
        found.setdefault(key, each)
        count[key] += 1
    return [(each, count[key]) for key, each in found.items()]


def plans(story: Story) -> Any:
    """The rank that each kind of device trains, of the one that it holds."""
    rows = kinds(story)
    drawn, axes = style.figure(1.8 + 0.42 * max(1, len(rows)))
    axis = axes[0, 0]
    names = [f"{count} x {each.group}" for each, count in rows]
    at = range(len(rows))
    axis.barh(at, [each.held for each, _ in rows], height=0.62, color="#c9d6df", label="held")
    axis.barh(at, [each.rank for each, _ in rows], height=0.62, color=SERIES[0], label="trained")
    for number, (each, _) in enumerate(rows):
        words = f"rank {each.rank} of {each.held}, {each.layers} layers, {each.precision}"
        axis.annotate(words, (each.held, number), (6, 0), textcoords="offset points", va="center", color=style.INK)
    axis.set_yticks(at, names)
    axis.invert_yaxis()
    widest = max((each.held for each, _ in rows), default=1)
    axis.set_xlim(0, 1.45 * widest)
    axis.grid(visible=False)
    ranks = sorted({each.rank for each, _ in rows})
    span = f"all train rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "none"
    style.titled(axis, f"Plans by kind of device: {span}", "rank of the adapter")
    style.keyed(drawn, *axis.get_legend_handles_labels())
    return drawn


def partition(story: Story) -> Any:
    """Who has which examples: every class of every device, or how devices differ in a fleet too large for that."""
    order = list(dict.fromkeys(story.groups.values()))
    known = [each for each in story.devices if each.data]
    devices = sorted(known, key=lambda each: (order.index(each.group), len(each.device), each.device))
    if not devices:
        drawn, axes = style.figure(3.0)
        _sizes(axes[0, 0], np.array([each.examples for each in story.devices]))
        return drawn
    counts = np.array([each.data for each in devices], np.float64)
    return _every(counts, [each.device for each in devices]) if len(devices) <= CELLS else _summary(counts)


def top_share(counts: Any) -> Any:
    """Of each device, the share of its examples that are of its most frequent class.

    Args:
        counts: (devices, classes).

    Returns:
        (devices,), those that have examples.
    """
    sizes = counts.sum(axis=1)
    return counts[sizes > 0].max(axis=1) / sizes[sizes > 0]


def _every(counts: Any, names: list[str]) -> Any:
    drawn, axes = style.figure(1.2 + 0.24 * counts.shape[1] + 0.075 * max(map(len, names)))
    axis = axes[0, 0]
    picture = axis.imshow(counts.T, aspect="auto", cmap="Blues")
    bar = drawn.colorbar(picture, ax=axis, pad=0.01)
    bar.set_label("examples", color=style.INK)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_yticks(range(counts.shape[1]))
    axis.grid(visible=False)
    axis.set_xticks(np.arange(len(names) - 1) + 0.5, minor=True)
    axis.set_yticks(np.arange(counts.shape[1] - 1) + 0.5, minor=True)
    axis.grid(which="minor", color=style.PAPER, linewidth=1)
    axis.tick_params(which="minor", length=0)
    share = float(np.mean(top_share(counts))) if counts.any() else 0.0
    style.titled(axis, f"Who has what: a device's main class is {share:.0%} of its examples", "", "class")
    return drawn


def _summary(counts: Any) -> Any:
    drawn, axes = style.figure(3.2, 1, 2)
    _sizes(axes[0, 0], counts.sum(axis=1))
    shares = 100 * top_share(counts)
    axes[0, 1].hist(shares, bins=np.linspace(0, 100, 26), color=SERIES[2])
    title = f"A device's main class is {np.mean(shares):.0f} % of its examples"
    style.titled(axes[0, 1], title, f"% of its examples ({counts.shape[1]} classes)", "devices")
    return drawn


def _sizes(axis: Any, sizes: Any) -> None:
    axis.hist(sizes, bins=min(30, max(5, len(sizes) // 3)), color=SERIES[0])
    middle = float(np.median(sizes)) if len(sizes) else 0.0
    style.titled(axis, f"Half of the devices have {middle:,.0f} examples or fewer", "examples of a device", "devices")
