"""Do devices under memory limits that the kernel enforces live, and do they train all that fits?

One fleet over a real broker: a server and one client for each limit, each in a control group of its own without swap.
All train a round, make their personal adapter and export it. Of each plan it is then asked whether the next rank or the
next precision would have been predicted to fit; and clients below what is possible must say so and not be killed.

    python -m benchmarks.limits [--quick] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.result import result
from edge_runtime.config import Config, dump, load
from edge_runtime.demo.limits import Limit, impose
from edge_runtime.demo.processes import Child, end, spawn, verb
from edge_runtime.errors import PlanError
from edge_runtime.wire import broker as embedded
from profiles.card import ModelCard
from profiles.find_card import find_card
from profiles.machine import with_reserve
from profiles.memory import PRECISIONS, TRAINED_BYTES, Setting, estimate

MIB = 2**20
LIMITS = (600, 650, 700, 800, 1000, 1500, 2500, 4000)
QUICK = (620, 1000)
TOO_SMALL = (300, 480)
RANKS = (2, 4, 8, 16, 32, 64)
SUBJECTS = ("networking", "text", "numbers", "files", "concurrency", "data", "language")
PLAN = re.compile(
    r"plan: rank (?P<rank>\d+) of (?P<held>\d+) held, "
    r"(?:last )?(?P<layers>all|\d+) of \d+ layers(?P<modules> \([^)]*\))?, "
    r"(?P<precision>\w+), (?P<compute>\w+) compute, micro-batch (?P<size>\d+) x (?P<length>\d+) tokens"
    r"(?P<again>, checkpointing(?: \d+ of \d+ layers)?)?(?P<optimizer>, 8-bit AdamW)?, "
    r"≤ (?P<peak>\d+) MiB"
)
SETTINGS = (
    "fleet.name=limits", "rounds.num_rounds=1", "adapter.max_rank=64", "adapter.max_length=256",
    "training.max_steps=4", "training.personal_steps=2", "device.eval_examples=4", "device.threads=1",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of one client."""

    limit: int
    code: int
    kills: int
    plan: re.Match[str] | None
    said: str

    @property
    def killed(self) -> bool:
        """Whether the kernel ended it, be it once."""
        return self.code == -signal.SIGKILL or self.kills > 0


def main() -> int:
    """Run the fleet and the clients that are too small, print the table and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two limits")
    parser.add_argument("--out", type=Path, default=Path("edge-limits"))
    parser.add_argument("--base", default="smollm2")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    sizes = [size * MIB for size in (QUICK if options.quick else LIMITS)]
    for precision in ("nf4", "int8", "bf16"):
        subprocess.run(verb("prepare", "--base", options.base, "--precision", precision), check=True)
    subprocess.run(verb("profile", "--base", options.base), check=True, stdout=subprocess.DEVNULL)
    with embedded.start("nats", store=options.out / "broker") as running:
        config = load(None, [*SETTINGS, f"rounds.min_available_nodes={len(sizes)}", f'device.base="{options.base}"'])
        address = str(running.address)
        fleet = _run(options.out, config, address, sizes)
        refused = [_alone(options.out, config, address, size * MIB) for size in TOO_SMALL]
    card = find_card(options.base)
    room = {outcome.limit: _larger_that_fits(card, config, outcome) for outcome in fleet if outcome.plan}
    Console(width=150).print(_table(fleet + refused, room))
    figures = {
        "limits": len(fleet),
        "finished": sum(outcome.code == 0 for outcome in fleet),
        "killed": sum(outcome.killed for outcome in fleet + refused),
        "not_largest": sum(bool(found) for found in room.values()),
        "refused_with_plan_error": sum(outcome.code == PlanError.exit_code for outcome in refused),
    }
    goals = {
        "limits": (">=", 2 if options.quick else 6), "finished": ("==", len(fleet)), "killed": ("==", 0),
        "not_largest": ("==", 0), "refused_with_plan_error": ("==", len(refused)),
    }  # fmt: skip
    return 0 if result("limits", figures, goals) else 1


def _run(out: Path, config: Config, address: str, sizes: list[int]) -> list[Outcome]:
    """The whole fleet, from the first process to the last."""
    file = out / "fleet.toml"
    file.write_text(dump(config), encoding="utf-8")
    server = spawn(
        "server", verb("server", "--config", str(file), "--store", str(out / "server"), "--broker", address),
        out / "logs" / "server.log",
    )  # fmt: skip
    clients = [_client(out, file, address, size, SUBJECTS[at % len(SUBJECTS)]) for at, size in enumerate(sizes)]
    try:
        while not all(child.ended for child in (server, *clients)):
            time.sleep(0.5)
            if any(child.failure() for child in clients):
                break  # the others would wait for it
        return [_outcome(child, size) for child, size in zip(clients, sizes, strict=True)]
    finally:
        end([server, *clients])


def _alone(out: Path, config: Config, address: str, size: int) -> Outcome:
    """A client that should see by itself that there is nothing it could do."""
    file = out / "fleet.toml"
    file.write_text(dump(config), encoding="utf-8")
    child = _client(out, file, address, size, SUBJECTS[0])
    try:
        child.process.wait(120)
    except subprocess.TimeoutExpired:
        child.process.terminate()
        child.process.wait()
    found = _outcome(child, size)
    end([child])
    return found


def _client(out: Path, file: Path, address: str, size: int, subject: str) -> Child:
    name = f"device-{size // MIB}"
    limit = impose(f"edge-runtime-{os.getpid()}-{name}", size)
    if limit.group is None:
        raise SystemExit(f"a limit that the kernel enforces is what this is about; here it is {limit.reason}")
    arguments = verb(
        "client", "--config", str(file), "--name", name, "--data", f"stdlib-docs:{subject}", "--broker", address,
        "--state-dir", str(out / "devices" / name),
    )  # fmt: skip
    return spawn(name, arguments, out / "logs" / f"{name}.log", limit)


def _outcome(child: Child, size: int) -> Outcome:
    code = child.process.poll()
    text = child.log.read_text(encoding="utf-8", errors="replace") if child.log.exists() else ""
    plans = list(PLAN.finditer(text))
    last = text.strip().splitlines()[-1] if text.strip() else ""
    return Outcome(size, code if code is not None else 1, _kills(child.limit), plans[-1] if plans else None, last)


def _kills(limit: Limit | None) -> int:
    """How many processes the kernel killed in this group for its memory."""
    for name in ("memory.oom_control", "memory.events"):
        file = limit.group / name if limit and limit.group else None
        if file and file.exists():
            found = re.search(r"^oom_kill (\d+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            return int(found[1]) if found else 0
    return 0


def _larger_that_fits(card: ModelCard, config: Config, outcome: Outcome) -> str:
    """A plan with the next rank or the next precision that is predicted to fit under the limit; '' if there is none."""
    found = outcome.plan
    if found is None:
        return ""
    targets = config.adapter.target_modules
    trained = tuple(found["modules"].strip(" ()").split(", ")) if found["modules"] else targets
    layers = card.num_layers if found["layers"] == "all" else int(found["layers"])
    chosen = Setting(
        targets, int(found["rank"]), int(found["held"]), layers, found["precision"], found["compute"],
        max_length=int(found["length"]), trained_modules=trained,
    )  # fmt: skip
    better = []
    if chosen.rank < config.adapter.max_rank:
        rank = next(rank for rank in RANKS if rank > chosen.rank)
        better.append(replace(chosen, rank=rank, held=max(rank, chosen.held)))
    above = [name for name in PRECISIONS if PRECISIONS[name] > PRECISIONS[chosen.precision] and name != "fp32"]
    if above:
        better.append(replace(chosen, precision=above[0]))
    bearable = with_reserve(outcome.limit, "").value
    for setting in better:
        for optimizer in TRAINED_BYTES:
            leanest = replace(setting, recomputed_layers=setting.layers_trained - 1, optimizer=optimizer)
            if estimate(card, leanest).total <= bearable:
                return f"rank {setting.rank} at {setting.precision}"
    return ""


def _table(outcomes: list[Outcome], room: dict[int, str]) -> Table:
    table = Table(title="devices under kernel-enforced limits", title_style="bold")
    for column in ("limit", "plan", "ended", "a larger one that fits"):
        table.add_column(column)
    for outcome in outcomes:
        plan = outcome.plan[0].removeprefix("plan: ") if outcome.plan else outcome.said
        ended = "killed" if outcome.killed else "well" if outcome.code == 0 else f"with {outcome.code}"
        table.add_row(f"{outcome.limit // MIB} MiB", plan, ended, room.get(outcome.limit) or "none")
    return table


if __name__ == "__main__":
    sys.exit(main())
