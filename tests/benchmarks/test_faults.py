"""Fleets of processes that are killed: a short version of the benchmark, and what its audit would find."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest

from benchmarks.faults import QUICK, live
from benchmarks.faults_audit import Audit, audit
from benchmarks.faults_fleet import Fleet, Scenario
from benchmarks.poor_link import Quality, poor_link, why_not
from edge_runtime.wire.broker import Settings, start
from tests.wire.conftest import require
from tests.wire.relay import free_port, relay

SMALL = Scenario("nats", {"a": 4, "b": 8}, layers=4, width=256, rounds=3, kills=0, chunk_bytes=8 * 1024)


def sound(found: Audit) -> None:
    """Everything is in its place."""
    assert (found.lost, found.doubled, found.unexplained, found.denied, found.left_out) == (0, 0, 0, 0, 0)
    assert (found.ended, found.finished) == (found.rounds, True)
    assert found.resent_bytes <= 0.05 * max(found.resumed_bytes, 1)


@pytest.mark.story
@pytest.mark.broker
@pytest.mark.parametrize("kind", ["nats", "mosquitto"])
def test_a_fleet_whose_parts_are_killed_in_turn_loses_and_doubles_nothing(kind: str, tmp_path: Path) -> None:
    require(kind)
    outcome = live(replace(QUICK, broker=kind, kills=6), tmp_path / "fleet")
    assert {kill.victim for kill in outcome.kills} == {"device", "server", "broker"}
    sound(outcome.audit)


@pytest.mark.story
@pytest.mark.broker
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_fleet_behind_a_link_that_loses_packets_comes_through(tmp_path: Path) -> None:
    quick = Quality(rate=400_000.0, delay=0.02, loss=0.02)
    outcome = live(replace(SMALL, kills=3, gap=2.0), tmp_path / "fleet", behind=quick)
    sound(outcome.audit)


@pytest.mark.story
@pytest.mark.broker
def test_one_fleet_spans_two_sites_and_outlives_a_cut_between_them(tmp_path: Path) -> None:
    """The server is at the hub, the devices are at a leaf; after the first update, the link is gone for a while."""
    port, journal = free_port(), tmp_path / "fleet" / "journal" / "server.jsonl"
    with relay(port) as line:
        at_leaf = Settings(leaf_of=f"127.0.0.1:{line.port}", ack_wait_s=3.0)
        with start("nats", store=tmp_path / "leaf", settings=at_leaf) as leaf:

            def cut() -> None:
                while not (journal.exists() and b'"taken"' in journal.read_bytes()):
                    time.sleep(0.01)
                line.cut()
                time.sleep(4.0)
                line.mend()

            fleet = Fleet(
                SMALL,
                tmp_path / "fleet",
                seen_from_devices=str(leaf.address),
                settings=Settings(hub_port=port, ack_wait_s=3.0),
            )
            cutter = Thread(target=cut, daemon=True)
            cutter.start()
            fleet.run()
            cutter.join()
    sound(audit(tmp_path / "fleet"))


@pytest.mark.story
@pytest.mark.broker
def test_the_audit_finds_what_was_lost_doubled_or_changed(tmp_path: Path) -> None:
    """A calm fleet is sound; with one line of its records altered it is not."""
    Fleet(SMALL, tmp_path / "fleet").run()
    sound(audit(tmp_path / "fleet"))
    journal = tmp_path / "fleet" / "journal" / "a.jsonl"
    lines = [json.loads(text) for text in journal.read_text(encoding="utf-8").splitlines() if text]
    [made] = [line for line in lines if line["what"] == "made" and line["offer"]["round"] == 2]
    second = {**made["offer"], "blob": {**made["offer"]["blob"], "sha256": "e" * 64}}
    told = {"at": made["at"], "life": 1, "what": "accepted", "sha": "e" * 64, "round": 2}
    payloads = tmp_path / "fleet" / "journal" / "payloads"
    (payloads / ("e" * 64)).write_bytes((payloads / made["offer"]["blob"]["sha256"]).read_bytes())
    with journal.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in ({**made, "offer": {**second, "client": "z"}}, told))
    found = audit(tmp_path / "fleet")
    assert (found.ended, found.lost) == (2, 1), "somebody was told that it is accepted, and the version lacks it"


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_poor_link_is_gone_when_it_is_left(tmp_path: Path) -> None:
    with poor_link(Quality()) as link:
        assert Path("/run/netns", link.namespace).exists()
    assert not Path("/run/netns", link.namespace).exists()
