"""What does a round move, by each method, from 2 to 1,000 devices? The survey's first question about FedAvg and FLoRA.

    python -m benchmarks.communication [--plot FILE]

Real payloads, made by the codecs of the wire: the update of a device and the bands of a version, of the attention
projections of Llama-3.2-1B at rank 16 on every device, in int8, factors drawn at random. Bytes up are a device's times
their number. Bytes down are those that devices receive; what leaves the server is one copy of each version, which the
broker hands on. For comparison: FedAvg of all weights in 16 bits, and FLoRA as published, which sends every device the
stack of what all sent. Devices hold no more than they train, but for what a method asks them to hold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.result import Goal, result
from edge_runtime.demo.plot import COLOURS
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.wire import codec
from server import aggregators
from server.aggregators.method import Aggregator, Shapes
from server.aggregators.page import PERIOD, RANK, REFERENCE

CODEC = "int8"
WEIGHTS = 1_235_814_400
"""Of Llama-3.2-1B, its tied embeddings once."""
DEVICES = (2, 10, 32, 100, 320, 1000)
FLORA_AS_PUBLISHED, FEDAVG = "FLoRA as published", "FedAvg of all weights, 16 bits"
GOALS: Mapping[str, Goal] = {"published_flora_exponent": (">=", 1.9), "largest_exponent_here": ("<=", 1.05)}
"""That what is said to grow does, and that nothing of ours grows faster than the number of devices."""


class Traffic(NamedTuple):
    """Bytes of a round.

    Attributes:
        up: that all devices send.
        down: that all devices receive.
        out: that leave the server, for a broker to hand on.
    """

    up: float
    down: float
    out: float

    @property
    def total(self) -> float:
        """What devices move."""
        return self.up + self.down


def payload(shapes: Shapes, rank: int, factor: Any) -> int:
    """Bytes of an adapter of that rank, or of one factor of it."""
    draw = np.random.default_rng(rank)
    layers = {}
    for name, (d_out, d_in) in shapes.items():
        a = draw.standard_normal((rank, d_in)).astype(np.float32)
        layers[name] = Pair(a, draw.standard_normal((d_out, rank)).astype(np.float32))
    return len(codec.encode(Adapter(layers), CODEC, factor=factor))


def device_traffic(method: Aggregator) -> tuple[float, float]:
    """Bytes that one device sends and receives in a round, the mean of a period."""
    shapes = dict.fromkeys(REFERENCE, (RANK, RANK)) if method.core else REFERENCE
    asks = [method.asks(number) for number in range(1, PERIOD + 1)]
    up = [payload(shapes, RANK, each.sent) for each in asks]
    down = [payload(shapes, RANK + method.beside, each.sent if method.apart else "ab") for each in asks]
    return sum(up) / PERIOD, sum(down) / PERIOD


def traffic() -> dict[str, dict[int, Traffic]]:
    """Way → number of devices → bytes of a round."""
    found: dict[str, dict[int, Traffic]] = {}
    for name, row in aggregators.METHODS.items():
        up, down = device_traffic(row.build())
        found[name] = {count: Traffic(count * up, count * down, down) for count in DEVICES}
    up, _ = device_traffic(aggregators.METHODS["flora"].build())
    found[FLORA_AS_PUBLISHED] = {count: Traffic(count * up, count * count * up, count * up) for count in DEVICES}
    whole = 2.0 * WEIGHTS
    found[FEDAVG] = {count: Traffic(whole * count, whole * count, whole) for count in DEVICES}
    return found


def exponent(each: Mapping[int, Traffic]) -> float:
    """How what is moved grows with the number of devices: the slope in logarithms."""
    first, last = min(each), max(each)
    return float(np.log(each[last].total / each[first].total) / np.log(last / first))


def table(found: Mapping[str, Mapping[int, Traffic]]) -> Table:
    """For people: MiB up and down, by number of devices."""
    made = Table(title="MiB that all devices move in a round", title_style="bold")
    made.add_column("way")
    for count in DEVICES:
        made.add_column(f"{count:,}", justify="right")
    made.add_column("out of the server at 1,000", justify="right")
    for name, each in sorted(found.items(), key=lambda item: item[1][max(DEVICES)].total):
        cells = [f"{each[count].total / 2**20:,.1f}" for count in DEVICES]
        made.add_row(name, *cells, f"{each[max(DEVICES)].out / 2**20:,.2f}")
    return made


SHOWN: Sequence[tuple[str, str]] = (
    (FEDAVG, FEDAVG),
    (FLORA_AS_PUBLISHED, FLORA_AS_PUBLISHED),
    ("flora", "FLoRA here: a frozen adapter of rank 32"),
    ("increment", "FedIT, FlexLoRA, HetLoRA, increment …"),
    ("ffa_lora", "FFA-LoRA"),
    ("fed_sb", "Fed-SB"),
)


def draw(found: Mapping[str, Mapping[int, Traffic]], path: Path) -> None:
    """Write the picture as a PNG; lines that coincide are one."""
    import matplotlib as mpl  # noqa: PLC0415 - only who wants a picture needs it
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    mpl.use("Agg")
    figure = Figure(figsize=(8.5, 5), dpi=150, layout="constrained")
    axis = figure.subplots()
    for colour, (name, label) in zip(COLOURS, SHOWN, strict=False):
        values = [found[name][count].total / 2**20 for count in DEVICES]
        axis.loglog(DEVICES, values, color=colour, marker="o", linewidth=2)
        lower = 9 if name == FLORA_AS_PUBLISHED else 3  # below the line above it
        ink: dict[str, Any] = {"color": "#333333", "fontsize": 9}
        axis.annotate(label, (DEVICES[-1], values[-1]), (8, -lower), textcoords="offset points", **ink)
    axis.set_xlabel("devices")
    axis.set_ylabel("MiB that all devices move in a round")
    axis.set_xticks(DEVICES, [f"{count:,}" for count in DEVICES])
    axis.minorticks_off()
    axis.set_xlim(1.8, 40_000)
    axis.set_title("Only FLoRA as published grows with the square of the fleet", loc="left", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#dddddd", linewidth=0.7)
    figure.savefig(path)


def main() -> int:
    """Count it; the exit code says whether the goals are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plot", type=Path, help="a PNG")
    options = parser.parse_args()
    found = traffic()
    Console(width=150).print(table(found))
    if options.plot:
        draw(found, options.plot)
    slopes = {name: round(exponent(each), 3) for name, each in found.items()}
    figures = {
        "published_flora_exponent": slopes[FLORA_AS_PUBLISHED],
        "largest_exponent_here": max(slopes[name] for name in aggregators.METHODS),
        "mib_at_1000": {name: round(each[1000].total / 2**20, 1) for name, each in found.items()},
    }
    return 0 if result("communication", figures, GOALS) else 1


if __name__ == "__main__":
    sys.exit(main())
