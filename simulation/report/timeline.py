"""Pictures of time: what each device did when, how groups spent theirs, and who closed rounds late."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from simulation.report import style
from simulation.report.story import Bar, Story
from simulation.report.style import ACTIVITIES, SERIES, TIMES

ROWS = 40
"""Devices in a Gantt chart; of a larger fleet, those that compute most often in it, of each group its share."""
ROUNDS = 8
"""Rounds in a Gantt chart, the first: more would be too thin to be seen."""


@dataclass(frozen=True)
class Late:
    """The update that closed a round.

    Attributes:
        round: its number.
        device: whose update was the last.
        seconds: from the round's beginning to that update.
        after: seconds by which it came later than the middle update.
    """

    round: int
    device: str
    seconds: float
    after: float


def shown(story: Story, count: int = ROWS) -> list[str]:
    """The devices of a Gantt chart: all, or those most often at work of each group, in the order of their numbers."""
    members: dict[str, list[str]] = defaultdict(list)
    for each in story.devices:
        members[each.group].append(each.device)
    if len(story.devices) <= count:
        return [name for names in members.values() for name in sorted(names, key=_in_order)]
    work: Counter[str] = Counter()
    end = until(story)[0]
    for bar in story.bars:
        if bar.kind == "computing" and bar.begin < end:
            work[bar.device] += 1
    found = []
    for names in members.values():
        share = max(1, count * len(names) // len(story.devices))
        found += sorted(sorted(names, key=lambda name: (-work[name], _in_order(name)))[:share], key=_in_order)
    return found


def _in_order(name: str) -> tuple[int, str]:
    """Devices of a group are numbered: those with fewer digits come first."""
    return len(name), name


def until(story: Story, rounds: int = ROUNDS) -> tuple[float, int]:
    """The virtual time at which that many versions were merged, and how many they are; the end if there are fewer."""
    if len(story.versions) > rounds:
        return story.versions[rounds - 1].seconds, rounds
    return story.seconds, len(story.versions)


def gantt(story: Story) -> Any:
    """What each device did, from when to when."""
    names = shown(story)
    end, rounds = until(story)
    rows = {name: number for number, name in enumerate(names)}
    drawn, axes = style.figure(max(2.8, 1.7 + 0.21 * len(names)))
    axis = axes[0, 0]
    unit, size = style.scaled(end, TIMES)
    axis.barh(range(len(names)), end / size, height=0.72, color=ACTIVITIES["waiting"][0])
    bars: dict[str, list[Bar]] = defaultdict(list)
    for bar in story.bars:
        if bar.device in rows and bar.begin < end:
            bars[bar.kind].append(bar)
    for kind, (colour, hatch) in ACTIVITIES.items():
        at = [rows[bar.device] for bar in bars[kind]]
        widths = [(min(bar.end, end) - bar.begin) / size for bar in bars[kind]]
        lefts = [bar.begin / size for bar in bars[kind]]
        # A coloured edge keeps what took a moment visible.
        edge = {"edgecolor": "#6f6f6f", "linewidth": 0} if hatch else {"edgecolor": colour, "linewidth": 0.8}
        axis.barh(at, widths, left=lefts, height=0.72, color=colour, hatch=hatch, **edge)
    for row in story.versions[:rounds]:
        axis.axvline(row.seconds / size, color=style.INK, linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(0, max(end / size, 1e-9))
    axis.grid(visible=False)
    part = f"{len(names)} of {len(story.devices):,} devices" if len(names) < len(story.devices) else "every device"
    first = f"the first {rounds} of {len(story.versions)} rounds" if rounds < len(story.versions) else "the whole run"
    style.titled(axis, f"What {part} did in {first}; dotted: a merge", f"virtual time, {unit}")
    _activities(drawn)
    return drawn


def _activities(drawn: Any) -> None:
    from matplotlib.patches import Patch  # noqa: PLC0415  as `style.figure`, which is called first

    patches = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="#6f6f6f", linewidth=0.4, label=kind)
        for kind, (colour, hatch) in ACTIVITIES.items()
    ]
    style.keyed(drawn, patches, list(ACTIVITIES), columns=len(patches))


def shares(story: Story) -> Mapping[str, Mapping[str, float]]:
    """Group → what its devices did → share of their time in the whole run."""
    groups, sizes = story.groups, Counter(story.groups.values())
    spent: dict[str, Counter[str]] = {name: Counter() for name in sizes}
    for bar in story.bars:
        if bar.device in groups:
            spent[groups[bar.device]][bar.kind] += bar.end - bar.begin  # type: ignore[assignment]
    found = {}
    for name, size in sizes.items():
        of = {kind: spent[name][kind] / max(size * story.seconds, 1e-12) for kind in ACTIVITIES if kind != "waiting"}
        found[name] = {**of, "waiting": max(0.0, 1 - sum(of.values()))}
    return found


def spent(story: Story) -> Any:
    """How each group spent its time."""
    of = shares(story)
    drawn, axes = style.figure(2.0 + 0.38 * len(of))
    axis = axes[0, 0]
    left = np.zeros(len(of))
    for kind, (colour, hatch) in ACTIVITIES.items():
        widths = np.array([100 * group[kind] for group in of.values()])
        axis.barh(list(of), widths, left=left, height=0.65, color=colour, hatch=hatch, edgecolor="#6f6f6f", linewidth=0)
        left += widths
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.grid(visible=False)
    busiest = max(of, key=lambda name: of[name]["computing"], default="nobody")
    share = of[busiest]["computing"] if of else 0.0
    style.titled(axis, f"Busiest: {busiest}, which computed {share:.0%} of its time", "% of the group's time")
    _activities(drawn)
    return drawn


def late(story: Story) -> list[Late]:
    """Of each round with at least two updates, the one that closed it."""
    of: dict[int, list[tuple[float, str]]] = defaultdict(list)
    for arrival in story.arrivals:
        of[arrival.round].append((arrival.at, arrival.device))
    found = []
    for number, updates in sorted(of.items()):
        if len(updates) > 1 and number in story.begun:
            at, device = max(updates)
            middle = float(np.median([when for when, _ in updates]))
            found.append(Late(number, device, at - story.begun[number], at - middle))
    return found


def stragglers(story: Story) -> Any:
    """When the updates of each round came, and whose came last."""
    groups, closing = story.groups, late(story)
    drawn, axes = style.figure(3.6, 1, 2, width_ratios=[2.4, 1])
    dots, tally = axes[0]
    times = [arrival.at - story.begun[arrival.round] for arrival in story.arrivals if arrival.round in story.begun]
    unit, size = style.scaled(max(times, default=1.0), TIMES)
    for number, group in enumerate(dict.fromkeys(groups.values())):
        colour, mark = SERIES[number % len(SERIES)], style.MARKS[number % len(style.MARKS)]
        points = [
            (arrival.round, (arrival.at - story.begun[arrival.round]) / size)
            for arrival in story.arrivals
            if groups.get(arrival.device) == group and arrival.round in story.begun
        ]
        dots.scatter(*np.array(points or np.empty((0, 2))).T, s=16, alpha=0.6, color=colour, marker=mark, label=group)
    dots.step(
        [each.round for each in closing], [each.seconds / size for each in closing], where="mid", color=style.INK,
        linewidth=1, label="the last of a round",
    )  # fmt: skip
    gain = float(np.mean([each.after for each in closing])) if closing else 0.0
    title = f"A round's last update comes {style.worded(gain, TIMES)} after its middle one, on average"
    style.titled(dots, title if closing else "No round had two updates", "round", f"{unit} after the round began")
    dots.xaxis.get_major_locator().set_params(integer=True)
    style.keyed(drawn, *dots.get_legend_handles_labels())
    last = Counter(groups[each.device] for each in closing if each.device in groups)
    ordered = {group: last[group] for group in dict.fromkeys(groups.values())}
    bars = tally.barh(list(ordered), list(ordered.values()), color=SERIES[1], height=0.6)
    tally.bar_label(bars, padding=3, color=style.INK)
    tally.set_ylim(max(3, len(ordered)) - 0.5, -0.5)
    tally.set_xlim(0, 1.15 * max([1, *ordered.values()]))
    tally.xaxis.get_major_locator().set_params(integer=True)
    tally.grid(visible=False)
    style.titled(tally, "Whose update was last", "rounds")
    return drawn
