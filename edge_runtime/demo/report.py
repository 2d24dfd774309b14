"""The demo's figures: the RESULT line, and the truncation errors from the server's metrics."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edge_runtime.demo.board import Row, bytes_as_fp32
from edge_runtime.demo.story import Ending

BITS: Mapping[str, int] = {"nf4": 4, "int8": 8, "bf16": 16, "fp16": 16, "fp32": 32}

PLAN = ("rank", "held", "bits", "layers")
"""The figures of a device that make two plans different."""

COMPARE: Mapping[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}

GOALS: Mapping[str, tuple[str, float]] = {
    "seconds": ("<=", 480),
    "different_plans": (">=", 3),
    "smallest_fall_global": (">=", 0.10),
    "smallest_fall_personal": (">=", 0.10),
    "export_max_logit_diff": ("<=", 1e-4),
}
"""For the demo as it comes; with other devices, data or rounds they are only figures."""


def truncations(metrics: Path) -> list[tuple[int, float]]:
    """(round, relative truncation error) of each merge that the server recorded; the last record of a round counts."""
    found: dict[int, float] = {}
    if metrics.exists():
        for line in metrics.read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            if event["event"] == "merge":
                found[event["round"]] = event["truncation"]
    return sorted(found.items())


def result(ending: Ending, metrics: Path) -> dict[str, Any]:
    """The RESULT object of the demo."""
    # One that never said a word is a device of the demo, too.
    devices = [_device(ending.board.rows.get(name, Row(name))) for name in sorted(ending.limits)]
    moved = sum(device["bytes_up"] + device["bytes_down"] for device in devices)
    fp32 = bytes_as_fp32(ending.board)
    figures: dict[str, Any] = {
        "seconds": round(ending.seconds, 1),
        "devices": devices,
        "different_plans": len({tuple(device[figure] for figure in PLAN) for device in devices}),
        "bytes_ratio": round(moved / fp32, 4) if fp32 else None,
        "smallest_fall_global": _smallest_fall(devices, "loss_global"),
        "smallest_fall_personal": _smallest_fall(devices, "loss_personal"),
        "export_max_logit_diff": _worst(devices, "export_max_logit_diff"),
        "truncation": [round(error, 6) for _, error in truncations(metrics)],
    }
    met = not ending.failures and all(
        figures[name] is not None and COMPARE[sign](figures[name], goal) for name, (sign, goal) in GOALS.items()
    )
    return {"name": "demo", "figures": figures, "goals": {name: list(goal) for name, goal in GOALS.items()}, "met": met}


def _device(row: Row) -> dict[str, Any]:
    report = row.report
    held = report.held_out if report else None
    return {
        "device": row.client,
        "rank": row.rank,
        "held": row.held,
        "bits": BITS.get(row.hello.precision, 0) if row.hello else 0,
        "layers": row.layers,
        "loss_base": held.base if held else None,
        "loss_global": held.merged if held else None,
        "loss_personal": held.personal if held else None,
        "bytes_up": report.bytes_up if report else 0,
        "bytes_down": report.bytes_down if report else 0,
        "peak_bytes": report.peak_bytes if report else 0,
        "export_max_logit_diff": report.export_max_logit_diff if report else None,
    }


def _smallest_fall(devices: list[dict[str, Any]], key: str) -> float | None:
    falls = [1 - device[key] / device["loss_base"] for device in devices if device[key] and device["loss_base"]]
    return round(min(falls), 4) if len(falls) == len(devices) and falls else None


def _worst(devices: list[dict[str, Any]], key: str) -> float | None:
    found = [device[key] for device in devices if device[key] is not None]
    return float(max(found)) if len(found) == len(devices) and found else None
