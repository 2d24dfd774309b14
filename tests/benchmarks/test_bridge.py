"""What rounds took, as a server's record and a simulation's events tell it."""

from __future__ import annotations

from typing import Any

from benchmarks.bridge_fleet import Round, real_rounds, virtual_rounds


def told(second: float, event: str, **facts: Any) -> dict[str, Any]:
    return {"time": f"2026-01-01T00:00:{second:06.3f}+00:00", "event": event, **facts}


def report(second: float, state: str, number: int, client: str = "a") -> dict[str, Any]:
    return told(second, "report", state=state, round=number, client=client)


def test_a_real_round_lasts_from_the_first_fetch_or_the_last_merge_to_its_merge() -> None:
    events = [
        report(1.0, "planned", 0),
        report(4.0, "fetching", 1, "b"),
        report(4.5, "fetching", 1),
        report(5.0, "evaluating", 1),
        report(5.5, "evaluating", 1, "b"),
        report(6.0, "training", 1),
        report(9.0, "offering", 1),
        report(9.5, "offering", 1, "b"),
        told(10.0, "update", round=1, client="a"),
        told(11.0, "merge", round=1),
        report(12.0, "fetching", 2),
        report(12.5, "evaluating", 2),
        report(14.5, "offering", 2),
        # What is said of a round after it is over changes nothing.
        told(15.25, "merge", round=2),
        report(16.0, "evaluating", 3),
    ]
    assert real_rounds(events) == [Round(7.0, {"a": 4.0, "b": 4.0}), Round(4.25, {"a": 2.0})]


def test_a_simulated_round_lasts_from_its_directive_to_its_version() -> None:
    def span(begin: float, end: float, number: int, kind: str = "computing") -> dict[str, Any]:
        return {"t": end, "event": "span", "device": "a", "kind": kind, "from": begin, "to": end, "round": number}

    events: list[dict[str, Any]] = [
        {"t": 0.0, "event": "directive", "phase": "gather", "round": 0},
        {"t": 1.0, "event": "directive", "phase": "train", "round": 1},
        span(1.0, 2.0, 1, "receiving"),
        span(2.0, 5.0, 1),
        span(6.0, 7.5, 1),
        {"t": 8.0, "event": "version", "round": 1},
        {"t": 8.0, "event": "directive", "phase": "train", "round": 2},
        {"t": 9.0, "event": "directive", "phase": "train", "round": 2},
        span(9.0, 11.0, 2),
        {"t": 12.0, "event": "version", "round": 2},
    ]
    assert virtual_rounds(events) == [Round(7.0, {"a": 4.5}), Round(4.0, {"a": 2.0})]
