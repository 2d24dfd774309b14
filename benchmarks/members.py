"""Does a server bear a fleet of 100,000 devices? What each message costs, against a fleet of 1,000.

    python -m benchmarks.members [--quick]

The rounds themselves (`server.rounds`) and the real store on a disk, without a broker and without updates' bytes: every
device says hello, then a round asks one in twenty, whose offers and updates come in. Each fleet is a process of its
own. What grows with the fleet shows as a ratio: of the microseconds for each message, and of a Directive's bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.resident import peak_bytes
from benchmarks.result import Goal, result
from edge_runtime import config as settings
from edge_runtime.lora.adapter import LayerSlot, Slot
from edge_runtime.wire import blobs
from edge_runtime.wire.messages import Hello, Offer, dump, group
from server import aggregators, rounds, standing
from server.directing import directive_of
from server.events import Event, Heard, MergeDone, Stored
from server.policy import policy_of
from server.state import State
from server.store import Store

GOALS: Mapping[str, Goal] = {
    "hello_ratio": ("<=", 2.0),
    "update_ratio": ("<=", 2.0),
    "directive_ratio": ("<=", 1.1),
    "restart_seconds": ("<=", 30.0),
    "peak_mb": ("<=", 1000.0),
}
SMALL, LARGE, UPDATES = 1_000, 100_000, 1_000
BASE = "b" * 64


def introduction(name: str) -> Hello:
    """A device with four modules in each of thirty layers."""
    modules = ("q_proj", "k_proj", "v_proj", "o_proj")
    names = (f"model.layers.{at}.self_attn.{each}" for at in range(30) for each in modules)
    slot = Slot({name: LayerSlot(576, 576, 16, 8) for name in names})
    return Hello(
        client=name, base=BASE, examples=200, groups=group(slot), device="a board", precision="nf4", plan="rank 8",
        software="benchmark",
    )  # fmt: skip


class Life:
    """A fleet's rounds, saved as the service saves them."""

    def __init__(self, folder: Path, members: int) -> None:
        self.config = settings.load(
            None,
            [
                f"rounds.min_available_nodes={members}",
                f"server.max_members={members}",
                "rounds.fraction_train=0.05",
                "rounds.num_rounds=9",
            ],
        )
        self.method = aggregators.build("increment")
        self.policy = policy_of(self.config, self.method, led=False)
        self.store = Store(folder)
        self.state: State = rounds.begin("one", BASE, 0.0)[0]
        self.written = self.state

    def happen(self, event: Event) -> None:
        """One event, and what is written of it."""
        state, _ = rounds.step(self.state, event, 0.0, self.policy)
        if state != self.state:
            self.store.save_rounds(standing.dump(state, self.written))
            self.written = state
        self.state = state

    @property
    def merging(self) -> bool:
        """Whether the round has all its updates."""
        return self.state.phase == "merging"

    def directive_bytes(self) -> int:
        """Of the message that says whom the open round asks."""
        return len(dump(directive_of(self.config, self.state, (), rank=16, method=self.method)))


def measure(members: int) -> dict[str, float]:
    """What the messages of one fleet cost, in microseconds each, and what a restart takes."""
    with tempfile.TemporaryDirectory() as folder:
        life, first = Life(Path(folder), members), introduction("first")
        started = time.perf_counter()
        for index in range(members):
            life.happen(Heard(first.model_copy(update={"client": f"device-{index}"})))
        hellos = time.perf_counter() - started
        asked, count, spent = 0, 0, 0.0
        while count < UPDATES and life.state.phase == "train":
            for name in life.state.asked[: UPDATES - count]:
                payload = name.encode()
                offer = Offer(
                    client=name, run="one", round=life.state.round, version=life.state.version,
                    blob=blobs.describe(payload), examples=200, loss_first=2.0, loss_last=1.0,
                )  # fmt: skip
                started = time.perf_counter()
                life.happen(Heard(offer))
                life.happen(Stored(offer))
                spent += time.perf_counter() - started
                count += 1
            asked = max(asked, life.state.tally.asked)
            if life.merging:
                life.happen(MergeDone(life.state.version + 1))
        size = life.directive_bytes()
        started = time.perf_counter()
        text = life.store.rounds()
        again = standing.load(text or "", life.store.members())
        restart = time.perf_counter() - started
        if again != life.state:
            raise AssertionError("what was written is not what was read")
        life.store.close()
    return {
        "hello_us": 1e6 * hellos / members,
        "update_us": 1e6 * spent / count,
        "directive_bytes": size,
        "asked": asked,
        "restart_seconds": restart,
        "peak_mb": peak_bytes() / 1e6,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure both fleets, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2,000 devices instead of 100,000")
    parser.add_argument("--members", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.members:
        print(json.dumps(measure(chosen.members)))
        return 0
    console, large = Console(), 2_000 if chosen.quick else LARGE
    table = Table("devices", "µs a hello", "µs an update", "Directive, bytes", "asked", "restart, s", "peak, MB")
    found: dict[int, dict[str, Any]] = {}
    for members in (SMALL, large):
        line = subprocess.run(
            [sys.executable, "-m", "benchmarks.members", "--members", str(members)],
            check=True, stdout=subprocess.PIPE, text=True,
        ).stdout  # fmt: skip
        found[members] = json.loads(line)
        table.add_row(f"{members:,}", *(f"{value:,.4g}" for value in found[members].values()))
    console.print(table)
    few, many = found[SMALL], found[large]
    compared = {"hello": "hello_us", "update": "update_us", "directive": "directive_bytes"}
    ratios = {f"{what}_ratio": many[figure] / few[figure] for what, figure in compared.items()}
    figures = {**many, **ratios, "members": large}
    return 0 if result("members", figures, GOALS) else 1


if __name__ == "__main__":
    sys.exit(main())
