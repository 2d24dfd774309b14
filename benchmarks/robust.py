"""What does a robust rule cost across unequal ranks, and how far do bad devices move it?

    python -m benchmarks.robust [--quick]

One square layer of a fleet of ranks 4 to 64, three of ten devices bad: what they send is a million times too large, and
so are the examples that they claim. Each rule merges in a process of its own, which tells its time and its peak of
memory, numpy and the making of the updates included; the plain mean of the honest devices alone is what they are
compared with.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.aggregation_fleet import round_of
from benchmarks.resident import peak_bytes
from benchmarks.result import Goal, result
from edge_runtime.lora.adapter import Adapter, Deferred
from edge_runtime.lora.algebra import distance, scale
from server import aggregators
from server.aggregators.method import Update
from server.aggregators.robust import ROBUST
from server.scratch import Scratch

GOALS: Mapping[str, Goal] = {
    f"{rule}_{figure}": goal
    for rule in ("trimmed_mean", "median")
    for figure, goal in (("seconds", ("<=", 60.0)), ("peak_mb", ("<=", 1000.0)), ("off", ("<=", 1.0)))
}
LAYER, RANK, TOO_LARGE = "layer", 64, 1e6


def bad(index: int) -> bool:
    """Three of ten devices, of all ranks."""
    return index % 10 in {1, 5, 8}


def poisoned(update: Update) -> Update:
    """The update of a bad device."""
    sent = Adapter(Deferred(update.trained.sizes, lambda name: scale(update.trained[name], TOO_LARGE)))
    return replace(update, trained=sent, weight=update.weight * TOO_LARGE)


def merged(rule: str | None, side: int, clients: int) -> Mapping[str, Any]:
    """One merge behind a rule.

    Returns:
        `seconds`, `peak_mb` of the process, `off` (the distance from the honest mean, in units of what that moves),
        `lost` (in the same units), and how many devices were `excluded`.
    """
    with tempfile.TemporaryDirectory() as folder:
        state, updates = round_of({LAYER: (side, side)}, clients, RANK, Scratch(Path(folder), memory=0))
        attacked = [poisoned(update) if bad(index) else update for index, update in enumerate(updates)]
        parameters = {} if rule is None else {"robust": rule, "byzantine": sum(map(bad, range(clients)))}
        method = aggregators.build("increment", **parameters)  # type: ignore[arg-type]
        began = time.perf_counter()
        found = method.combine(state, attacked)
        seconds, peak = time.perf_counter() - began, peak_bytes() / 1e6
        honest = [update for index, update in enumerate(updates) if not bad(index)]
        wanted = aggregators.build("increment").combine(state, honest).state.adapter[LAYER]
        unit = distance(wanted, state.adapter[LAYER])
        off = distance(found.state.adapter[LAYER], wanted) / unit
    lost, excluded = found.layers[LAYER].lost / unit, len(found.excluded)
    return {"seconds": seconds, "peak_mb": peak, "off": off, "lost": lost, "excluded": excluded}


def apart(rule: str | None, side: int, clients: int) -> Mapping[str, Any]:
    """The same in a process of its own.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", "benchmarks.robust", "--merge", json.dumps([rule, side, clients])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
        done.check_returncode()
    told: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def main() -> int:
    """Run it; the exit code says whether the goals are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the side, 20 devices")
    parser.add_argument("--merge", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.merge:
        print(json.dumps(merged(*json.loads(asked.merge))))
        return 0
    side, clients = (1024, 20) if asked.quick else (4096, 100)
    table = Table(title=f"one {side} x {side} layer, {clients} devices, 3 of 10 bad", title_style="bold")
    for column in ("rule", "seconds", "peak", "off the honest mean", "lost, at most", "left out"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    figures: dict[str, float] = {}
    for rule in (None, *ROBUST):
        found = apart(rule, side, clients)
        table.add_row(
            rule or "none", f"{found['seconds']:.1f}", f"{found['peak_mb']:.0f} MB", f"{found['off']:.3g}",
            f"{found['lost']:.2g}", str(found["excluded"]),
        )  # fmt: skip
        figures |= {f"{rule or 'mean'}_{figure}": found[figure] for figure in ("seconds", "peak_mb", "off")}
    Console().print(table)
    return 0 if result("robust", figures, GOALS) else 1


if __name__ == "__main__":
    sys.exit(main())
