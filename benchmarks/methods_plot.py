"""Draws what `benchmarks.methods` found: all ways in one setting, some of them over rounds and in all settings.

Ways whose learning rate falls from round to round have a picture of their own, of the same three panels.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

from benchmarks.methods_settings import CENTRAL, OURS, RIVALS, SAME, SETTINGS, WAYS, falling

if TYPE_CHECKING:
    from benchmarks.methods import Lives
    from benchmarks.methods_fleet import Way

mpl.use("Agg")

from matplotlib import pyplot as plt

COLORS = dict(zip((OURS, SAME, *RIVALS), ("#c0392b", "#2c3e50", "#2980b9", "#8e44ad", "#27ae60"), strict=True))
SHOWN = {name: color for way, color in COLORS.items() for name in (way.name, falling(way).name)}
OTHER = "#b8bfc6"
SETTING = "pilot"
WIDEST = 0.72
"""Where the axis of the first panel ends; means beyond it are written there."""


def draw(lives: Lives, path: Path) -> None:
    """Three panels side by side, as PNG; and again in `…-falling.png`, if there are such ways.

    Settings that were not run are left out.
    """
    for falls, to in ((False, path), (True, path.with_stem(f"{path.stem}-falling"))):
        mine = {order: life for order, life in lives.items() if (WAYS[order.way].falls != "constant") is falls}
        if mine:
            _draw(mine, to, falling if falls else lambda way: way)


def _draw(lives: Lives, path: Path, form: Callable[[Way], Way]) -> None:
    """Some lives; `form` says which of a way's forms they are lives of."""
    from benchmarks.methods import by_way, loss_of  # noqa: PLC0415 - that module imports this one when it draws

    ours, same = form(OURS).name, form(SAME).name
    figure, (bars, curves, places) = plt.subplots(1, 3, figsize=(17, 7), width_ratios=(1.25, 1, 1.1))
    _bars(bars, by_way(lives, SETTING, loss_of))
    _curves(curves, lives, [form(way).name for way in COLORS] + [CENTRAL.name])
    found = {setting: by_way(lives, setting, loss_of) for setting in SETTINGS}
    found = {setting: losses for setting, losses in found.items() if {ours, same} <= losses.keys()}
    _places(places, found, [ours, *(form(rival).name for rival in RIVALS)], same)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axes: Any, losses: Mapping[str, list[float]]) -> None:
    order = sorted(losses, key=lambda way: -statistics.mean(losses[way]))
    means = [statistics.mean(losses[way]) for way in order]
    axes.barh(order, [min(mean, WIDEST) for mean in means], color=[SHOWN.get(way, OTHER) for way in order])
    for row, way in enumerate(order):
        axes.plot(
            [x for x in losses[way] if x < WIDEST], [row] * sum(x < WIDEST for x in losses[way]), "|", color="#222"
        )
        axes.text(0.006, row, f"{means[row]:.3f}", va="center", fontsize=7.5, color="white", fontweight="bold")
    axes.set_xlim(0, WIDEST)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("held-out loss of the global model, nats; a stroke is a seed")
    axes.set_title("Ten devices of ranks 2 to 32, Dirichlet 0.3", fontsize=11)
    _plain(axes)


def _curves(axes: Any, lives: Lives, ways: Sequence[str]) -> None:
    for way in ways:
        found = [life["rounds"] for order, life in lives.items() if order.setting == SETTING and order.way == way]
        if not found:
            continue
        rounds = sorted(set.intersection(*({int(number) for number in points} for points in found)))
        means = [statistics.mean(_at(points, number) for points in found) for number in rounds]
        axes.plot(rounds, means, color=SHOWN.get(way, OTHER), marker="o", markersize=3, label=way)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("round")
    axes.set_ylabel("held-out loss, nats")
    axes.set_title("The same over rounds", fontsize=11)
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)


def _at(points: Mapping[Any, Mapping[str, float]], number: int) -> float:
    return points[number]["loss"] if number in points else points[str(number)]["loss"]


def _places(axes: Any, found: Mapping[str, Mapping[str, list[float]]], ways: Sequence[str], same: str) -> None:
    for nth, way in enumerate(ways):
        for row, losses in enumerate(found.values()):
            if way not in losses:
                continue
            # Seed by seed, for seeds differ more than ways do.
            ratios = [mine / other for mine, other in zip(losses[way], losses[same], strict=False)]
            y, label = row + 0.18 * (1.5 - nth), way if row == 0 else None
            axes.plot(ratios, [y] * len(ratios), "|", color=SHOWN[way], markersize=9)
            axes.plot(statistics.mean(ratios), y, "o", color=SHOWN[way], label=label)
    axes.axvline(1, color="#2c3e50", linewidth=1)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_xlabel("loss / that with rank 32 on every device; a stroke is a seed")
    axes.set_title("Texts dealt in other ways", fontsize=11)
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", alpha=0.25)
    axes.set_axisbelow(True)
