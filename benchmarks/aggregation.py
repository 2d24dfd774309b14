"""Is aggregation over unequal ranks exact, fast, and bounded in memory, whatever the number of devices and the model?

    python -m benchmarks.aggregation [--quick]

Against the naive way: the dense float32 sum of all products, and `numpy.linalg.svd` of it. Both read the same updates
from the same file, both use all BLAS threads, and they take turns in one process. What is measured is the method
`increment` as the server calls it, tail included, not a kernel of it. Peaks of memory are those of processes of their
own, with numpy and the making of the updates in them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_info

from benchmarks.aggregation_fleet import round_of
from benchmarks.aggregation_round import BLOCKS_7B, BLOCKS_405B, LLAMA_7B, LLAMA_405B, RANK, apart, blocks
from benchmarks.result import Goal, result
from server.aggregators.increment import increment
from server.aggregators.method import State, Update, by_layer
from server.scratch import Scratch

GOALS: Mapping[str, Goal] = {
    "speedup_10": (">=", 60), "excess_10": ("<=", 1e-4),
    "speedup_100": (">=", 30), "excess_100": ("<=", 1e-3),
    "speedup_1000": (">=", 10), "excess_1000": ("<=", 5e-3),
    "stream_memory_ratio": ("<=", 1.05), "llama7b_peak_mb": ("<=", 1500), "llama405b_peak_mb": ("<=", 4000),
    "scaling_exponent": ("<=", 1.1),
}  # fmt: skip
LAYER = "layer"
PANEL = 4096
"""Columns that the naive way multiplies at a time."""
Dense = NDArray[np.float32]


class Versus(NamedTuple):
    """One layer, both ways.

    Attributes:
        ours: seconds, one for each turn.
        naive: seconds.
        excess: of our error over the optimum, relative.
        reported: our own figure of the error, relative to the true one.
        bound: the certificate, relative to the true error.
        how: the way that was chosen, and why.
    """

    ours: list[float]
    naive: list[float]
    excess: float
    reported: float
    bound: float
    how: str

    @property
    def speedup(self) -> float:
        """How many times faster, by the medians."""
        return statistics.median(self.naive) / statistics.median(self.ours)


def naive(state: State, updates: Sequence[Update]) -> tuple[Dense, NDArray[np.float32]]:
    """The dense sum of the layer, panel by panel, and its singular values; the vectors are computed as well."""
    whole = state.adapter[LAYER].product()
    panel: list[tuple[Dense, Dense]] = []

    def added() -> None:
        if panel:
            np.add(whole, np.concatenate([b for b, _ in panel], axis=1) @ np.concatenate([a for _, a in panel]), whole)
            panel.clear()

    for share, update in by_layer(state, updates)[LAYER]:
        trained, received = update.trained[LAYER], update.received[LAYER]
        panel += [(np.float32(share) * trained.b, trained.a), (np.float32(-share) * received.b, received.a)]
        if sum(b.shape[1] for b, _ in panel) >= PANEL:
            added()
    added()
    _, s, _ = np.linalg.svd(whole, full_matrices=False)
    return whole, s


def versus(side: int, clients: int, turns: int) -> Versus:
    """One square layer of so many devices, the two ways in turn."""
    with tempfile.TemporaryDirectory() as folder:
        state, updates = round_of({LAYER: (side, side)}, clients, RANK, Scratch(Path(folder), memory=0))
        method, theirs = increment(), []
        seconds, merged = _timed(lambda: method.combine(state, updates))
        ours, whole, s = [seconds], np.zeros((0, 0), np.float32), np.zeros(0, np.float32)
        for _ in range(turns):
            seconds, (whole, s) = _timed(lambda: naive(state, updates))
            theirs.append(seconds)
            seconds, merged = _timed(lambda: method.combine(state, updates))
            ours.append(seconds)
        found, report = merged.state.adapter[LAYER], merged.layers[LAYER]
        error = float(np.linalg.norm((whole - found.product()).astype(np.float64)))
        best = float(np.linalg.norm(s[RANK:].astype(np.float64)))
    told = report.truncated / error, report.bound / error
    return Versus(ours, theirs, error / best - 1, *told, f"{report.how}: {report.why}")


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def scaling(side: int, numbers: Sequence[int], console: Console) -> tuple[float, Table]:
    """The exponent of seconds against the number of devices, least squares in logarithms; and the table."""
    table = Table(title=f"one {side} x {side} layer: time against the number of devices", title_style="bold")
    for column in ("devices", "seconds", "ms a device", "peak", "way"):
        table.add_column(column, justify="left" if column == "way" else "right")
    seconds = []
    for clients in numbers:
        found = apart({LAYER: (side, side)}, clients)
        seconds.append(found["seconds"])
        table.add_row(
            f"{clients:,}", f"{found['seconds']:.2f}", f"{1e3 * found['seconds'] / clients:.2f}",
            f"{found['peak_mb']:.0f} MB", found["layers"][LAYER]["how"],
        )  # fmt: skip
        console.print(f"{clients} devices: {found['seconds']:.2f} s")
    slope = np.polyfit(np.log(numbers), np.log(seconds), 1)[0] if len(numbers) > 1 else math.nan
    return float(slope), table


def llama_7b(count: int, dense_second: float, side: int) -> tuple[Mapping[str, float], str]:
    """A whole round of 32 devices, or so many blocks of it; the dense way is extrapolated from one square layer.

    Args:
        count: blocks that are really merged.
        dense_second: seconds of the dense way for a layer of `side` x `side`.
        side: of that layer.
    """
    found = apart(blocks(LLAMA_7B, count), 32)
    seconds = found["seconds"] * BLOCKS_7B / count
    # A dense SVD costs the product of the sides and the shorter side once more.
    dense = sum(dense_second * math.prod(shape) * min(shape) / side**3 for shape in LLAMA_7B.values()) * BLOCKS_7B
    figures = {"llama7b_seconds": round(seconds, 1), "llama7b_peak_mb": round(found["peak_mb"], 1)}
    return {**figures, "llama7b_dense_hours": round(dense / 3600, 2)}, (
        f"Llama-7B, 32 devices, {count} of {BLOCKS_7B} blocks{'' if count == BLOCKS_7B else ', extrapolated'}: "
        f"{seconds:.0f} s, peak {found['peak_mb']:.0f} MB, {found['disk_mb']:.0f} MB of scratch file; the dense way, "
        f"extrapolated from one layer of {side} x {side}: {dense / 3600:.1f} h"
    )


def llama_405b(names: Sequence[str]) -> tuple[Mapping[str, float], str]:
    """A round of 100 devices: a layer of each of these names is merged, others take the time of one of their shape."""
    times: dict[tuple[int, int], float] = {}
    peak = 0.0
    for name in names:
        found = apart({name: LLAMA_405B[name]}, 100)
        times[LLAMA_405B[name]] = found["seconds"]
        peak = max(peak, found["peak_mb"])
    known = [shape for shape in LLAMA_405B.values() if shape in times]
    hours = sum(times[shape] for shape in known) * BLOCKS_405B / 3600
    figures = {"llama405b_peak_mb": round(peak, 1), "llama405b_hours": round(hours, 3)}
    return figures, (
        f"Llama-3-405B, 100 devices: one layer each of {', '.join(names)} measured "
        f"({', '.join(f'{seconds:.1f} s' for seconds in times.values())}), peak {peak:.0f} MB; {len(known)} of "
        f"{len(LLAMA_405B)} matrices of {BLOCKS_405B} blocks, extrapolated: {hours:.2f} h"
    )


def main() -> int:
    """Run it; the exit code says whether the goals are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the side, a few blocks, one large layer")
    quick = parser.parse_args().quick
    console, side = Console(), 1024 if quick else 4096
    console.print(f"BLAS threads, for both ways: {[pool['num_threads'] for pool in threadpool_info()]}")
    table, dense_second = _versus_table(side), math.nan
    figures: dict[str, float] = {}
    for clients, turns in ((10, 2), (100, 2), (1000, 2)):
        found = versus(side, clients, turns)
        figures |= {f"speedup_{clients}": round(found.speedup, 1), f"excess_{clients}": found.excess}
        dense_second = statistics.median(found.naive) if clients == 10 else dense_second
        _row(table, clients, found)
        console.print(f"{clients} devices: {found.speedup:.0f} times faster")
    peaks = [apart({LAYER: (side, side)}, clients)["peak_mb"] for clients in ((4000, 8000) if quick else (1000, 2000))]
    slope, grown = scaling(1024, (10, 100, 1000) if quick else (10, 100, 1000, 10_000), console)
    small, said_7b = llama_7b(1 if quick else BLOCKS_7B, dense_second, side)
    names = ("q_proj",) if quick else ("q_proj", "k_proj", "gate_proj", "down_proj")
    large, said_405b = llama_405b(names)
    figures |= {"stream_memory_ratio": round(peaks[1] / peaks[0], 3), "stream_peak_mb": round(peaks[0], 1)}
    console.print(table, grown, said_7b, said_405b, sep="\n")
    return 0 if result("aggregation", {**figures, **small, **large, "scaling_exponent": round(slope, 3)}, GOALS) else 1


def _versus_table(side: int) -> Table:
    table = Table(title=f"one {side} x {side} layer, ranks 4 to 64, to rank {RANK}", title_style="bold")
    for column in ("devices", "ours", "dense", "faster", "excess", "error told", "bound", "way"):
        table.add_column(column, justify="left" if column == "way" else "right")
    return table


def _row(table: Table, clients: int, found: Versus) -> None:
    table.add_row(
        str(clients), f"{statistics.median(found.ours):.2f} s", f"{statistics.median(found.naive):.1f} s",
        f"{found.speedup:.0f} x", f"{found.excess:.1e}", f"{found.reported:.3f}", f"{found.bound:.2f}",
        found.how.partition(":")[0],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
