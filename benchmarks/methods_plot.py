"""Draws what `benchmarks.methods` found: all ways in one setting, some of them over rounds, and over unequal ranks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

from benchmarks.methods_settings import CENTRAL, OURS, RIVALS, SAME
from benchmarks.slices import interval

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
APART = ("ranks-alike", "ranks-apart", "pilot")
RANKS = ("ten of 8", "four of 4, four of 8,\ntwo of 16", "four of 2, three of 4,\n8, 16, 32")
SETTING = "pilot"


def draw(lives: Lives, path: Path) -> None:
    """Three panels side by side, as PNG; settings that were not run leave theirs empty."""
    from benchmarks.methods import by_way, loss_of  # noqa: PLC0415 - that module imports this one when it draws

    figure, (bars, curves, apart) = plt.subplots(1, 3, figsize=(17, 6.5), width_ratios=(1.25, 1, 1))
    losses = by_way(lives, SETTING, loss_of)
    _bars(bars, losses)
    _curves(curves, lives)
    _apart(apart, {setting: by_way(lives, setting, loss_of) for setting in APART})
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axes: Any, losses: Mapping[str, list[float]]) -> None:
    order = sorted(losses, key=lambda way: -statistics.mean(losses[way]))
    means = [statistics.mean(losses[way]) for way in order]
    spread = [interval(losses[way]) if len(losses[way]) > 1 else 0.0 for way in order]
    colours = [SHOWN.get(way, OTHER) for way in order]
    axes.barh(order, means, xerr=spread, color=colours, error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#555"})
    for row, mean in enumerate(means):
        axes.text(0.01, row, f"{mean:.3f}", va="center", fontsize=7.5, color="white", fontweight="bold")
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("held-out loss of the global model, nats (95 % interval)")
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
    axes.set_xlabel("round")
    axes.set_ylabel("held-out loss, nats")
    axes.set_title("The same over rounds", fontsize=11)
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)


def _at(points: Mapping[Any, Mapping[str, float]], number: int) -> float:
    return points[number]["loss"] if number in points else points[str(number)]["loss"]


def _apart(axes: Any, found: Mapping[str, Mapping[str, list[float]]]) -> None:
    for way in [OURS.name, *(rival.name for rival in RIVALS), "zero_pad", "rbla"]:
        places = [at for at, setting in enumerate(APART) if way in found[setting]]
        means = [statistics.mean(found[APART[at]][way]) for at in places]
        spread = [interval(found[APART[at]][way]) if len(found[APART[at]][way]) > 1 else 0.0 for at in places]
        shift = [at + 0.03 * len(axes.containers) for at in places]
        axes.errorbar(shift, means, yerr=spread, marker="o", capsize=3, label=way, color=SHOWN.get(way))
    axes.set_xticks(range(len(APART)), RANKS, fontsize=8)
    axes.set_xlabel("ranks of the ten devices, of about one sum")
    axes.set_ylabel("held-out loss, nats")
    axes.set_title("Ranks ever farther apart", fontsize=11)
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", alpha=0.25)
    axes.set_axisbelow(True)
