"""Does the wire survive? Devices, server and broker are killed at random instants, and every byte is accounted for.

Fleets of real processes over the embedded NATS broker and over Mosquitto: the product's client, service, stores and
MQTT transport; only what a device learns is drawn from a seed. Whoever is killed starts again on the state that
SIGKILL left. Afterwards every version is computed once more from what the devices themselves wrote down
(`faults_audit`). A third fleet has its devices behind a link of 50 kB/s that loses and delays packets (`poor_link`).

    python -m benchmarks.faults [--quick] [--broker nats|mosquitto|both] [--seed N] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.faults_audit import Audit, audit
from benchmarks.faults_fleet import Fleet, Kill, Scenario
from benchmarks.poor_link import Quality, poor_link, why_not
from benchmarks.result import Goal, result
from edge_runtime.wire.broker import Settings

VICTIMS = ("device", "server", "broker")
GOALS: dict[str, Goal] = {
    "kills": (">=", 200),
    "lost": ("==", 0),
    "doubled": ("==", 0),
    "unexplained": ("==", 0),
    "rounds_unfinished": ("==", 0),
    "left_out": ("==", 0),
    "fleets_unfinished": ("==", 0),
    "resent_share": ("<=", 0.05),
}

FULL = Scenario("nats", {"a": 8, "b": 16, "c": 12}, layers=24, width=768, rounds=30, kills=105, gap=2.5)
"""Updates of 0.6 to 1.2 MB, 5 to 10 chunks; bands of 1.2 MB."""
SLOW = Scenario(
    "nats", {"a": 4, "b": 8}, layers=10, width=512, rounds=6, kills=18, gap=8.0, chunk_bytes=24 * 1024, upload=3.0
)
"""Updates of 80 to 160 kB, some 2 to 4 s of a link that two devices share; chunks of 24 KiB."""
QUICK = replace(FULL, rounds=6, kills=9, gap=1.5)
QUICK_SLOW = replace(SLOW, rounds=2, kills=3, gap=5.0)


@dataclass(frozen=True)
class Outcome:
    """What one fleet went through, and what became of it."""

    scenario: Scenario
    kills: tuple[Kill, ...]
    audit: Audit
    seconds: float

    def mid_upload(self, victim: str) -> int:
        """Kills of such a victim while some upload was half stored."""
        spans = self.audit.mid_upload
        return sum(
            any(begin < kill.at < end for begin, end in spans) for kill in self.kills if kill.victim == victim
        )  # fmt: skip


def live(scenario: Scenario, folder: Path, *, behind: Quality | None = None) -> Outcome:
    """One fleet's life and its audit."""
    began = time.monotonic()
    with poor_link(behind, scenario.seed) if behind else nullcontext() as link:
        # NATS repeats what is not acknowledged after this long; a kill makes somebody wait for it.
        settings = Settings(ack_wait_s=30.0 if behind else 10.0)
        fleet = (
            Fleet(scenario, folder, "0.0.0.0", f"{link.host}:PORT", link.launch, settings)  # noqa: S104  seen from the namespace
            if link
            else Fleet(scenario, folder, settings=settings)
        )
        fleet.run()
    return Outcome(scenario, tuple(fleet.kills), audit(folder), time.monotonic() - began)


def series(scenario: Scenario, folder: Path, behind: Quality | None, console: Console) -> list[Outcome]:
    """Fleets, one after the other, until there have been as many kills as the scenario wants."""
    outcomes: list[Outcome] = []
    left = scenario.kills
    while left > 0:
        number = len(outcomes)
        next_one = replace(scenario, kills=left, seed=scenario.seed + number)
        place = folder / f"{scenario.broker}{'-link' if behind else ''}-{number}"
        outcomes.append(live(next_one, place, behind=behind))
        shutil.rmtree(place / "broker")
        found = outcomes[-1]
        left -= len(found.kills)
        console.print(
            f"[dim]{place.name}: {len(found.kills)} kills in {found.seconds:.0f} s, {found.audit.ended} of "
            f"{found.audit.rounds} rounds as they must be[/]"
        )
    return outcomes


def table(found: dict[str, list[Outcome]]) -> Table:
    """One row for each broker and victim."""
    columns = (
        "broker",
        "victim",
        "kills",
        "mid-upload",
        "rounds",
        "accepted",
        "lost",
        "doubled",
        "resumed",
        "sent again",
    )
    shown = Table()
    for column in columns:
        shown.add_column(column, no_wrap=True)
    for name, outcomes in found.items():
        audits = [outcome.audit for outcome in outcomes]
        for victim in VICTIMS:
            kills = sum(kill.victim == victim for outcome in outcomes for kill in outcome.kills)
            row = [name, victim, str(kills), str(sum(outcome.mid_upload(victim) for outcome in outcomes))]
            if victim == VICTIMS[-1]:
                resumed = sum(a.resumed_bytes for a in audits)
                share = sum(a.resent_bytes for a in audits) / resumed if resumed else 0.0
                row += [
                    f"{sum(a.ended for a in audits)} of {sum(a.rounds for a in audits)}",
                    str(sum(a.accepted for a in audits)),
                    str(sum(a.lost for a in audits)),
                    str(sum(a.doubled for a in audits)),
                    f"{sum(a.resumed for a in audits)} ({resumed / 1e6:.1f} MB)",
                    f"{share:.1%}",
                ]
            shown.add_row(*row, end_section=victim == VICTIMS[-1])
    return shown


def figures(found: dict[str, list[Outcome]], seconds: float, skipped: str) -> dict[str, object]:
    """What the RESULT line says."""
    outcomes = [outcome for several in found.values() for outcome in several]
    audits = [outcome.audit for outcome in outcomes]
    resumed = sum(a.resumed_bytes for a in audits)
    victims = Counter(kill.victim for outcome in outcomes for kill in outcome.kills)
    stored = sum(a.stored_bytes for a in audits)
    return {
        "kills": sum(victims.values()),
        **{f"kills_{victim}": victims[victim] for victim in VICTIMS},
        "kills_mid_upload": sum(outcome.mid_upload(victim) for outcome in outcomes for victim in VICTIMS),
        "fleets": len(outcomes),
        "fleets_unfinished": sum(not a.finished for a in audits),
        "rounds": sum(a.rounds for a in audits),
        "rounds_ended": sum(a.ended for a in audits),
        "rounds_unfinished": sum(a.rounds - a.ended for a in audits),
        "accepted": sum(a.accepted for a in audits),
        "lost": sum(a.lost for a in audits),
        "doubled": sum(a.doubled for a in audits),
        "unexplained": sum(a.unexplained for a in audits),
        "denied": sum(a.denied for a in audits),
        "left_out": sum(a.left_out for a in audits),
        "missed_while_dead": sum(a.missed for a in audits),
        "resumed_uploads": sum(a.resumed for a in audits),
        "resumed_bytes": resumed,
        "resent_share": sum(a.resent_bytes for a in audits) / resumed if resumed else None,
        # Of all uploads, what reached the server again for any reason: NATS repeats what was not acknowledged.
        "delivered_again_share": sum(a.again_bytes for a in audits) / stored if stored else None,
        "poor_link": skipped or "50 kB/s, 50 ms, 1 % loss",
        "seconds": seconds,
    }


def main() -> int:
    """Run it; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few kills of each")
    parser.add_argument("--broker", choices=["nats", "mosquitto", "both"], default="both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="leave all journals, logs and stores in this folder")
    chosen = parser.parse_args()
    console, began = Console(stderr=True), time.monotonic()
    full, slow = FULL, SLOW
    goals = dict(GOALS)
    if chosen.quick:
        full, slow = QUICK, QUICK_SLOW
        goals["kills"] = (">=", 12)
    folder = chosen.keep or Path(tempfile.mkdtemp(prefix="edge-faults-"))
    found: dict[str, list[Outcome]] = {}
    skipped = why_not()
    try:
        for kind in ("nats", "mosquitto") if chosen.broker == "both" else (chosen.broker,):
            found[kind] = series(replace(full, broker=kind, seed=chosen.seed), folder, None, console)
            if not skipped:
                behind = replace(slow, broker=kind, seed=chosen.seed)
                found[f"{kind}, 50 kB/s"] = series(behind, folder, Quality(), console)
    finally:
        if chosen.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    if skipped:
        console.print(f"[yellow]no fleet behind a poor link: {skipped}[/]")
    Console(width=125).print(table(found))
    return 0 if result("faults", figures(found, time.monotonic() - began, skipped), goals) else 1


if __name__ == "__main__":
    sys.exit(main())
