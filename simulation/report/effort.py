"""Pictures of what devices gave and got: a round's time and energy by kind, and what an adapter of their own brings."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simulation.report import style
from simulation.report.story import Own, Story
from simulation.report.style import ENERGIES, SERIES, TIMES


@dataclass(frozen=True)
class Effort:
    """What a kind of device gave.

    Attributes:
        group: of the fleet's file.
        seconds: of computing in each round of each of its devices, ascending.
        joules: of all its devices.
        updates: of them that the server accepted.
    """

    group: str
    seconds: tuple[float, ...]
    joules: float
    updates: int


def efforts(story: Story) -> list[Effort]:
    """Of each kind that computed, in the order of the fleet's file."""
    groups = story.groups
    rounds: dict[tuple[str, int], float] = defaultdict(float)
    for bar in story.bars:
        if bar.kind == "computing" and bar.device in groups:
            rounds[bar.device, bar.round] += bar.end - bar.begin
    seconds: dict[str, list[float]] = defaultdict(list)
    for (device, _), spent in rounds.items():
        seconds[groups[device]].append(spent)
    joules: dict[str, float] = defaultdict(float)
    for device, spent in story.joules.items():
        if device in groups:
            joules[groups[device]] += spent
    updates = Counter(groups[arrival.device] for arrival in story.arrivals if arrival.device in groups)
    return [
        Effort(group, tuple(sorted(seconds[group])), joules[group], updates[group])
        for group in dict.fromkeys(groups.values())
        if group in seconds
    ]


def effort(story: Story) -> Any:
    """How long a round takes each kind of device, and the energy of each kind."""
    found = efforts(story)
    drawn, axes = style.figure(2.0 + 0.38 * len(found), 1, 2, sharey=True)
    times, energy = axes[0]
    names, at = [each.group for each in found], range(len(found))
    unit, size = style.scaled(max((each.seconds[-1] for each in found), default=1.0), TIMES)
    for number, each in enumerate(found):
        low, middle, high = np.quantile(each.seconds, (0.1, 0.5, 0.9)) / size
        times.plot([low, high], [number, number], color=SERIES[0], linewidth=5, alpha=0.35, solid_capstyle="round")
        times.plot([middle], [number], marker="o", markersize=8, color=SERIES[0])
    times.set_yticks(at, names)
    times.set_ylim(max(1, len(found)) - 0.5, -0.5)
    times.set_xlim(left=0)
    middles = {each.group: float(np.median(each.seconds)) for each in found}
    slowest = max(middles, key=lambda name: middles[name], default="nobody")
    said = f"Slowest: {slowest}, {style.worded(middles[slowest], TIMES)} a round" if found else "Nobody computed"
    style.titled(times, said, f"{unit} of computing in a round: the middle, and 10 to 90 %")
    _energy(energy, found)
    return drawn


def _energy(axis: Any, found: Sequence[Effort]) -> None:
    most = max((each.joules for each in found), default=1.0)
    unit, size = style.scaled(most, ENERGIES)
    bars = axis.barh(range(len(found)), [each.joules / size for each in found], height=0.6, color=SERIES[4])
    words = [
        f"{style.worded(each.joules / each.updates, ENERGIES)} an update" if each.updates else "no update"
        for each in found
    ]
    axis.bar_label(bars, words, padding=4, color=style.INK, fontsize=9)
    axis.set_xlim(0, 1.5 * max(most / size, 1e-9))
    axis.grid(visible=False)
    total = sum(each.joules for each in found)
    style.titled(axis, f"Energy: {style.worded(total, ENERGIES)} in all", f"{unit} of all devices of the kind")


def better(own: Sequence[Own]) -> int:
    """Devices whose personal adapter has a lower loss than the global one."""
    return sum(each.personal < each.held_out for each in own)


def personal(story: Story) -> Any:
    """Each device's personal adapter against the last global one, on what it holds out."""
    own, groups = story.own, story.groups
    known = [each for each in own if each.accuracy is not None and each.personal_accuracy is not None]
    drawn, axes = style.figure(4.4, 1, 2)
    pairs = [(each.device, each.held_out, each.personal) for each in own]
    _scatter(axes[0, 0], pairs, groups)
    means = [float(np.mean(values)) for values in ([each.held_out for each in own], [each.personal for each in own])]
    title = f"Own adapters: lower loss on {better(own)} of {len(own)} devices"
    style.titled(axes[0, 0], title, f"loss of the last global adapter, {means[0]:.3g} on average",
                 f"of a device's own, {means[1]:.3g} on average")  # fmt: skip
    _gains(axes[0, 1], own, known, groups)
    style.keyed(drawn, *axes[0, 0].get_legend_handles_labels())
    return drawn


def _scatter(axis: Any, pairs: Sequence[tuple[str, float, float]], groups: Mapping[str, str]) -> None:
    for number, group in enumerate(dict.fromkeys(groups.values())):
        points = [(x, y) for device, x, y in pairs if groups.get(device) == group]
        colour, mark = SERIES[number % len(SERIES)], style.MARKS[number % len(style.MARKS)]
        axis.scatter(*np.array(points or np.empty((0, 2))).T, s=18, alpha=0.65, color=colour, marker=mark, label=group)
    values = [value for _, *both in pairs for value in both]
    ends = [min(values), max(values)]
    axis.plot(ends, ends, color=style.FAINT, linestyle=":", linewidth=1.3)


def _gains(axis: Any, own: Sequence[Own], known: Sequence[Own], groups: Mapping[str, str]) -> None:
    """By kind of device: accuracy of both adapters where it is known, or else their losses."""
    told = known or own
    pairs = {each.device: (each.accuracy, each.personal_accuracy) for each in known}
    pairs = pairs or {each.device: (each.held_out, each.personal) for each in own}
    kinds = [group for group in dict.fromkeys(groups.values()) if any(groups[each.device] == group for each in told)]
    size = 100.0 if known else 1.0
    for column, (name, colour) in enumerate((("global", "#c9d6df"), ("own", SERIES[0]))):
        means = [
            size * float(np.mean([pairs[each.device][column] for each in told if groups[each.device] == kind]))
            for kind in kinds
        ]
        at = [number + 0.19 * (2 * column - 1) for number in range(len(kinds))]
        bars = axis.barh(at, means, height=0.36, color=colour, label=f"{name} adapter")
        axis.bar_label(bars, fmt="%.3g", padding=3, color=style.INK, fontsize=8)
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set_ylim(len(kinds) - 0.5, -0.5)
    axis.margins(x=0.12)
    axis.grid(visible=False)
    means = [size * float(np.mean([pair[column] for pair in pairs.values()])) for column in (0, 1)]
    what, unit = ("accuracy", " %") if known else ("loss", "")
    title = f"Mean {what}: {means[0]:.3g} → {means[1]:.3g}{unit}"
    style.titled(axis, title, "% of held-out tokens" if known else "loss")
    axis.legend(frameon=False, fontsize=8, loc="lower right", labelcolor=style.INK)
