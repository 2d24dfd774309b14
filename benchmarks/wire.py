"""What compression costs: bytes up against held-out loss for each codec, its speed, and what the protocol adds.

    python -m benchmarks.wire [--quick]

A fleet of ten unequal devices learns once for each codec, with and without error feedback, from the same seeds in one
process (`wire_fleet`). Bytes are those of the blobs that would travel. Speed is measured on the updates of that
training, on one core; the protocol's own bytes are counted on the real agent, client and service (`wire_overhead`).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import wire_fleet, wire_overhead
from benchmarks.result import Goal, result
from benchmarks.wire_learning import Outcome, Uplink, Way, increases, learn, ratio, spread
from edge_runtime.lora.adapter import Adapter
from edge_runtime.wire import allocate, codec, feedback, update
from edge_runtime.wire.layout import Layer
from edge_runtime.wire.update import Terms

GOALS: Mapping[str, Goal] = {
    "tight_bytes_ratio": (">=", 10.0),
    "tight_loss_increase": ("<=", 0.005),
    "lean_bytes_ratio": (">=", 25.0),
    "lean_loss_increase": ("<=", 0.02),
    "codec_mb_s": (">=", 150.0),
    "overhead": ("<=", 0.02),
}

PLAIN = Way("fp32", feedback=False)
TIGHT, LEAN = Way("auto", 11), Way("auto", 28)
OTHERS = (
    Way("int4"), Way("int2"), Way("int1"), Way("int1", feedback=False), Way("auto", 28, feedback=False), Way("topk"),
)  # fmt: skip
"""Ways that show what is gained by what; one seed is enough for them."""
MB = 1e6


def main() -> int:
    """Measure, print the tables and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few rounds, and only what the goals need")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/natural-instructions"), help="*.train.jsonl")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6, help="of each device in each round")
    parser.add_argument("--seeds", type=int, default=0)
    options = parser.parse_args()
    console = Console(width=150)
    rounds, seeds = options.rounds or (4 if options.quick else 8), options.seeds or (1 if options.quick else 2)
    found: dict[Way, list[Outcome]] = {}
    plain: Uplink | None = None
    for seed in range(seeds):
        fleet = wire_fleet.build(options.data, seed)
        for way in (PLAIN, TIGHT, LEAN, *(OTHERS if seed == 0 and not options.quick else ())):
            outcome, uplink = learn(
                fleet, way, rounds=rounds, steps=options.steps, seed=seed,
                say=lambda text: console.print(text, style="dim"),
            )  # fmt: skip
            found.setdefault(way, []).append(outcome)
            plain = uplink if plain is None else plain
    if plain is None:
        raise ValueError("expected at least one seed")
    torch.set_num_threads(1)
    speeds = {name: speed(name, plain.log) for name in codec.CODECS if name != "none"}
    mixed = {f"auto 1/{way.part:g}": mixed_speed(way, plain.log) for way in (TIGHT, LEAN)}
    overhead = wire_overhead.measure()
    console.print(_learning(found))
    console.print(_speeds({**speeds, **mixed}))
    console.print(
        f"protocol: {overhead['control_bytes']:.0f} bytes of control messages and {overhead['framing_bytes']:.0f} of "
        f"framing in {overhead['messages']:.0f} messages, beside {overhead['payload_bytes'] / MB:.2f} MB"
    )
    figures = {
        "tight_bytes_ratio": round(ratio(found, TIGHT, PLAIN), 2),
        "tight_loss_increase": round(statistics.mean(increases(found, TIGHT, PLAIN)), 5),
        "lean_bytes_ratio": round(ratio(found, LEAN, PLAIN), 2),
        "lean_loss_increase": round(statistics.mean(increases(found, LEAN, PLAIN)), 5),
        "tight_standard_error": _rounded(spread(increases(found, TIGHT, PLAIN))),
        "lean_standard_error": _rounded(spread(increases(found, LEAN, PLAIN))),
        "codec_mb_s": round(min([*(rate for rate, _ in speeds.values()), *(rate for rate, _ in mixed.values())]), 1),
        "auto_mb_s": round(min(auto_speed(way, plain.log) for way in (TIGHT, LEAN)), 1),
        "overhead": round(overhead["overhead"], 5),
        "seeds": seeds,
    }
    return 0 if result("wire", figures, GOALS) else 1


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 5)


def speed(name: str, log: Sequence[tuple[Adapter, Adapter]]) -> tuple[float, float]:
    """MB of fp32 a second that are encoded and decoded, and bits of a number in the blob."""
    return _timed([(change, name) for _, change in log])


def mixed_speed(way: Way, log: Sequence[tuple[Adapter, Adapter]]) -> tuple[float, float]:
    """The same with what `auto` chose; the choice itself is not counted here."""
    orders = [allocate.order(change, Adapter({name: received[name] for name in change})) for received, change in log]
    return _timed([(one.change, allocate.choose(one, 4 * one.change.parameters / way.part)) for one in orders])


def _timed(work: Sequence[tuple[Adapter, str | tuple[Layer, ...]]]) -> tuple[float, float]:
    numbers, best, size = sum(change.parameters for change, _ in work), math.inf, 0
    for _ in range(3):
        # Time of this thread: what others do on the machine meanwhile is no matter of the codec.
        began, size = time.thread_time(), 0
        for change, how in work:
            blob = codec.encode(change, how)
            codec.decode(blob)
            size += len(blob)
        best = min(best, time.thread_time() - began)
    return 4 * numbers / MB / best, 8 * size / numbers


def auto_speed(way: Way, log: Sequence[tuple[Adapter, Adapter]]) -> float:
    """MB of fp32 a second of which `auto` makes updates: choosing, packing until it fits, and what is owed."""
    began = time.thread_time()
    for received, change in log:
        update.make(change, received, feedback.NONE, Terms("auto", int(4 * change.parameters / way.part)))
    return 4 * sum(change.parameters for _, change in log) / MB / (time.thread_time() - began)


def _learning(found: Mapping[Way, Sequence[Outcome]]) -> Table:
    table = Table(title="ten devices of ranks 2 to 32: the same life with other codecs", title_style="bold")
    for column in ("uplink", "feedback", "seeds", "bytes up", "fewer", "held-out loss", "higher", "accuracy"):
        table.add_column(column, justify="left" if column in {"uplink", "feedback"} else "right")
    for way, outcomes in found.items():
        higher, error = increases(found, way, PLAIN), spread(increases(found, way, PLAIN))
        table.add_row(
            way.name, "yes" if way.feedback else "no", str(len(outcomes)),
            f"{statistics.mean(one.bytes_up for one in outcomes) / MB:.2f} MB", f"{ratio(found, way, PLAIN):.1f} x",
            f"{statistics.mean(one.loss for one in outcomes):.4f}",
            f"{statistics.mean(higher):+.2%}" + ("" if math.isnan(error) or way == PLAIN else f" ± {error:.2%}"),
            f"{statistics.mean(one.accuracy for one in outcomes):.3f}",
        )  # fmt: skip
    return table


def _speeds(speeds: Mapping[str, tuple[float, float]]) -> Table:
    table = Table(title="encode and decode, one core, on these updates", title_style="bold")
    for column in ("codec", "MB/s of fp32", "bits a number"):
        table.add_column(column, justify="left" if column == "codec" else "right")
    for name, (rate, bits) in speeds.items():
        table.add_row(name, f"{rate:.0f}", f"{bits:.2f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
