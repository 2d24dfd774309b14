"""The demo's picture: how the held-out loss of each device fell, what was sent, and what merging cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from edge_runtime.demo.board import Board
from edge_runtime.demo.table import plan
from edge_runtime.errors import missing_extra

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette: colours that stay apart for colour-blind readers, in print too."""


def draw(board: Board, truncation: Sequence[tuple[int, float]], fp32_bytes: int, path: Path, title: str) -> None:
    """Write the picture as a PNG.

    Args:
        board: the fleet at its end.
        truncation: (round, relative truncation error) of each merge.
        fp32_bytes: what the exchange would have taken in plain fp32.
        path: the PNG.
        title: one line over all.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_extra("matplotlib", "demo") from error
    mpl.use("Agg")
    figure = Figure(figsize=(13, 5.2), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    losses, moved, error_axis = figure.subplots(1, 3, width_ratios=[2.2, 1, 1])
    _losses(losses, board)
    _moved(moved, board, fp32_bytes)
    _truncation(error_axis, truncation)
    for axis in (losses, moved, error_axis):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.7)
        axis.set_axisbelow(True)
    figure.savefig(path)


def _losses(axis: Any, board: Board) -> None:
    last = 0
    for colour, row in zip(cycle(COLOURS), board.rows.values(), strict=False):
        if not row.held_out:
            continue
        versions, values = zip(*row.held_out, strict=True)
        last = max(last, *versions)
        axis.plot(versions, values, color=colour, marker="o", linewidth=2, label=f"{row.client}: {plan(row)}")
        personal = row.report.held_out.personal if row.report else None
        if personal is not None:
            at = versions[-1] + 0.5
            axis.plot([versions[-1], at], [values[-1], personal], color=colour, linestyle=":", linewidth=1.5)
            axis.plot(at, personal, color=colour, marker="*", markersize=14)
            # Text wears ink, not the series colour: the star beside it carries the identity.
            axis.annotate(f"{personal:.2f}", (at, personal), (8, -3), textcoords="offset points", color="#333333")
    axis.set_xticks([*range(last + 1), last + 0.5])
    axis.set_xticklabels(["base", *(f"v{number}" for number in range(1, last + 1)), "personal"])
    axis.set_xlim(-0.15, last + 0.85)
    axis.set_ylabel("held-out loss on the device's own data (nats per token)")
    axis.set_title("Every device's loss", loc="left", fontsize=11)
    axis.legend(frameon=False, fontsize=8.5, loc="upper right")


def _moved(axis: Any, board: Board, fp32_bytes: int) -> None:
    reports = [row.report for row in board.rows.values() if row.report]
    moved = sum(report.bytes_up + report.bytes_down for report in reports)
    bars = axis.bar(
        ["fp32 adapters", "moved"], [fp32_bytes / 2**20, moved / 2**20], color=["#bbbbbb", COLOURS[0]], width=0.6
    )
    axis.bar_label(bars, fmt="%.1f MiB", padding=3)
    axis.set_ylabel("MiB, up and down, all devices and rounds")
    axis.set_title(f"Bytes: {moved / fp32_bytes:.0%} of fp32" if fp32_bytes else "Bytes", loc="left", fontsize=11)


def _truncation(axis: Any, truncation: Sequence[tuple[int, float]]) -> None:
    rounds = [str(number) for number, _ in truncation]
    bars = axis.bar(rounds, [100 * error for _, error in truncation], color=COLOURS[2], width=0.6)
    axis.bar_label(bars, fmt="%.2f %%", padding=3)
    axis.set_ylim(0, max(1.0, *(130 * error for _, error in truncation)) if truncation else 1.0)
    axis.set_xlabel("round")
    axis.set_ylabel("% of the merged change's norm")
    axis.set_title("Truncation error (kept as tail)", loc="left", fontsize=11)
