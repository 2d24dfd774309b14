"""How a report's figures look: their colours, their axes, and units that fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge_runtime.errors import missing_extra

SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B5B5B")
"""Okabe and Ito's colours, which stay apart for colour-blind readers; lines also differ in dashes and marks."""
DASHES = ("-", "--", "-.", ":")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
ACTIVITIES: Mapping[str, tuple[str, str]] = {
    "computing": ("#0072B2", ""),
    "sending": ("#D55E00", ""),
    "receiving": ("#E69F00", ""),
    "paused": ("#CC79A7", "xx"),
    "away": ("#B8B8B8", "////"),
    "waiting": ("#E9EEF2", ""),
}
"""What devices do: its colour and its hatch."""
INK, FAINT, PAPER = "#1d2329", "#5c6670", "#fbfbf9"
WIDTH = 11.0
"""Inches of every figure; 110 dots to each."""


def figure(height: float, rows: int = 1, columns: int = 1, **layout: Any) -> tuple[Any, Any]:
    """An empty figure and an array of its axes (rows, columns).

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  matplotlib belongs to an extra
    except ModuleNotFoundError as error:
        raise missing_extra("matplotlib", "simulate") from error
    drawn = Figure(figsize=(WIDTH, height), dpi=110, layout="constrained", facecolor=PAPER)
    axes = drawn.subplots(rows, columns, squeeze=False, **layout)
    for axis in axes.flat:
        axis.set_facecolor(PAPER)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(FAINT)
        axis.tick_params(colors=FAINT, labelsize=9)
        axis.grid(axis="y", color="#dfe2e4", linewidth=0.7)
        axis.set_axisbelow(True)
    return drawn, axes


def keyed(drawn: Any, handles: Any, labels: Any, columns: int = 4) -> None:
    """Put a legend under all axes, where it hides nothing."""
    at = {"loc": "outside lower center", "ncols": min(columns, max(1, len(labels)))}
    drawn.legend(handles, labels, frameon=False, fontsize=9, labelcolor=INK, **at)


def titled(axis: Any, title: str, x: str = "", y: str = "") -> None:
    """Give axes their words."""
    axis.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axis.set_xlabel(x, color=INK)
    axis.set_ylabel(y, color=INK)


def line(number: int) -> dict[str, Any]:
    """How the line of that number looks: no two alike among the first 28."""
    count = len(SERIES)
    return {"color": SERIES[number % count], "linestyle": DASHES[number // count % 4], "marker": MARKS[number % count]}


def scaled(largest: float, units: Mapping[str, float]) -> tuple[str, float]:
    """The largest unit of which there is at least one and a half, and its size."""
    fitting = [(size, name) for name, size in units.items() if largest >= 1.5 * size]
    size, name = max(fitting) if fitting else min((size, name) for name, size in units.items())
    return name, size


TIMES = {"s": 1.0, "min": 60.0, "h": 3600.0, "days": 86400.0}
BYTES = {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}
ENERGIES = {"J": 1.0, "kJ": 1e3, "Wh": 3600.0, "kWh": 3.6e6, "MWh": 3.6e9}


def worded(value: float, units: Mapping[str, float]) -> str:
    """A quantity in the unit that fits, such as `3.2 h`."""
    name, size = scaled(value, units)
    # Three figures and no exponent: of a unit there may be more than a thousand.
    return f"{float(f'{value / size:.3g}'):,.10g} {name}".rstrip()
