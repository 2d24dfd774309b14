"""The demo's table: live while the fleet works, final when it has finished."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from edge_runtime.demo.board import Board, Row
from edge_runtime.demo.limits import Limit

STATES: Mapping[str, tuple[str, str]] = {
    "planned": ("cyan", "planned"),
    "fetching": ("blue", "fetching"),
    "evaluating": ("magenta", "evaluating"),
    "training": ("yellow", "training"),
    "paused": ("white", "paused"),
    "offering": ("blue", "sending"),
    "waiting": ("white", "waiting"),
    "personalising": ("yellow", "personal training"),
    "exporting": ("magenta", "exporting"),
    "done": ("green", "done"),
    "failed": ("red", "failed"),
}
"""State of a report → colour, words."""


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def plan(row: Row) -> str:
    """The plan in a few words."""
    if row.hello is None:
        return "…"
    everything = {name.split(".self_attn")[0].split(".mlp")[0] for name in row.slot.layers}
    layers = "all layers" if row.layers == len(everything) else f"last {row.layers} of {len(everything)}"
    return f"rank {row.rank} (holds {row.held}), {layers}, {row.hello.precision}"


def live(board: Board, limits: Mapping[str, Limit]) -> Table:
    """One row a device, as it is now."""
    table = Table(title=_title(board), title_style="bold", header_style="bold")
    for column in ("device", "memory", "plan", "state", "step", "loss", "held-out loss", "sent", "received"):
        left = column in {"device", "plan", "state", "held-out loss"}
        table.add_column(column, justify="left" if left else "right")
    for name, limit in limits.items():
        row = board.rows.get(name, Row(name))
        report = row.report
        colour, words = STATES[report.state] if report else ("white", "starting")
        if not row.online and (report is None or report.state not in {"done", "failed"}):
            colour, words = "red", "offline"
        table.add_row(
            Text(name, style="bold"),
            size(limit.bytes),
            plan(row),
            Text(words, style=colour),
            f"{report.step}/{report.steps}" if report and report.steps else "",
            f"{report.loss:.3f}" if report and report.loss is not None else "",
            " → ".join(f"{loss:.3f}" for _, loss in row.held_out),
            size(report.bytes_up) if report else "",
            size(report.bytes_down) if report else "",
        )
    return table


def _title(board: Board) -> str:
    directive = board.directive
    if directive is None or directive.phase == "gather":
        return "devices are joining"
    if directive.phase == "finish":
        return "all rounds are merged; devices make their personal adapters"
    return f"round {directive.round} of {directive.num_rounds}"


def final(board: Board, limits: Mapping[str, Limit]) -> Table:
    """What each device leaves with."""
    table = Table(title="What each device leaves with", title_style="bold", header_style="bold")
    for column in (
        "device",
        "plan",
        "base",
        "global",
        "personal",
        "peak of limit",
        "sent",
        "received",
        "reloaded |Δlogit|",
    ):
        table.add_column(column, justify="left" if column in {"device", "plan"} else "right")
    for name, limit in limits.items():
        row = board.rows.get(name, Row(name))
        report = row.report
        if report is None:
            continue
        held = report.held_out
        table.add_row(
            Text(name, style="bold"),
            plan(row),
            f"{held.base:.3f}" if held.base is not None else "—",
            _fall(held.merged, held.base),
            _fall(held.personal, held.base),
            f"{report.peak_bytes / 2**20:.0f} of {limit.bytes / 2**20:.0f} MiB",
            size(report.bytes_up),
            size(report.bytes_down),
            f"{report.export_max_logit_diff:.1e}" if report.export_max_logit_diff is not None else "—",
        )
    return table


def line(row: Row) -> str:
    """One device in one line, for logs and pipes."""
    report = row.report
    if report is None:
        return f"{row.client}: {'online' if row.online else 'offline'}"
    held = report.held_out
    losses = [f"{name} {value:.3f}" for name, value in (
        ("base", held.base), (f"v{held.version}", held.merged), ("personal", held.personal)
    ) if value is not None]  # fmt: skip
    known = f" [{', '.join(losses)}]" if losses else ""
    return f"{row.client}: {STATES[report.state][1]}, round {report.round}{known}" + (
        f" — {report.detail}" if report.detail else ""
    )


def _fall(value: float | None, base: float | None) -> str:
    if value is None or base is None:
        return "—"
    return f"{value:.3f} ({(value - base) / base:+.0%})"
