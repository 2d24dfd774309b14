"""Draws what `benchmarks.methods` found: all ways in one setting, some of them over rounds and in all settings."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

from benchmarks.methods_settings import CENTRAL, OURS, RIVALS, SAME, SETTINGS

if TYPE_CHECKING:
    from benchmarks.methods import Lives

mpl.use("Agg")

from matplotlib import pyplot as plt

SHOWN = {
    OURS.name: "#c0392b",
    SAME.name: "#2c3e50",
    **dict(zip((w.name for w in RIVALS), ("#2980b9", "#8e44ad", "#27ae60"), strict=True)),
}
OTHER = "#b8bfc6"
SETTING = "pilot"
WIDEST = 0.72
"""Where the axis of the first panel ends; means beyond it are written there."""


def draw(lives: Lives, path: Path) -> None:
    """Three panels side by side, as PNG; settings that were not run are left out."""
    from benchmarks.methods import by_way, loss_of  # noqa: PLC0415 - that module imports this one when it draws

    figure, (bars, curves, places) = plt.subplots(1, 3, figsize=(17, 7), width_ratios=(1.25, 1, 1.1))
    _bars(bars, by_way(lives, SETTING, loss_of))
    _curves(curves, lives)
    found = {setting: by_way(lives, setting, loss_of) for setting in SETTINGS}
    _places(places, {setting: losses for setting, losses in found.items() if {OURS.name, SAME.name} <= losses.keys()})
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


def _curves(axes: Any, lives: Lives) -> None:
    for way in (*SHOWN, CENTRAL.name):
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


def _places(axes: Any, found: Mapping[str, Mapping[str, list[float]]]) -> None:
    for nth, way in enumerate([OURS.name, *(rival.name for rival in RIVALS)]):
        for row, losses in enumerate(found.values()):
            if way not in losses:
                continue
            # Seed by seed, for seeds differ more than ways do.
            ratios = [mine / same for mine, same in zip(losses[way], losses[SAME.name], strict=False)]
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
