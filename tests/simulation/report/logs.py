"""A run that was written by hand, so that all that is to be seen in it is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simulation.report.story import Story, told

LOSSES = (0.8, 0.5, 0.4)
HOUR = 3600.0


def fleet(rounds: int = 3, method: str = "svd") -> dict[str, Any]:
    return {"t": 0.0, "event": "fleet", "seed": 0, "base": "SmolLM2-135M", "devices": 3, "rounds": rounds,
            "method": method, "floor": 0.1}  # fmt: skip


def device(name: str, group: str, rank: int, data: object = (4, 0)) -> dict[str, Any]:
    return {"t": 0.0, "event": "device", "device": name, "group": group, "rank": rank, "held": 8, "layers": 30,
            "precision": "bf16", "plan": "", "examples": 4, "data": data}  # fmt: skip


def span(name: str, kind: str, begin: float, end: float, number: int) -> dict[str, Any]:
    return {"t": end, "event": "span", "device": name, "kind": kind, "from": begin, "to": end, "round": number}


def version(number: int, loss: float | None, *, hours: float | None = None) -> dict[str, Any]:
    """Of which every round costs an hour, 2 MiB up, 1 MiB down and 100 J."""
    at = HOUR * (number if hours is None else hours)
    return {"t": at, "event": "version", "round": number, "version": number, "seconds": at, "loss": loss, "floor": 0.1,
            "held_out": 0.9, "updates": 2, "truncation": 0.01 * number, "bytes_up": number * 2.0 * 2**20,
            "bytes_down": number * 2.0**20, "joules": 100.0 * number}  # fmt: skip


def round_of(number: int, loss: float | None) -> list[dict[str, Any]]:
    """An hour in which pi-0 computes for a quarter and pi-1 is away for half, and nano-0 closes the round."""
    begin = HOUR * (number - 1)
    update = {"event": "server", "what": "update", "round": number, "age": 0}
    return [
        {"t": begin, "event": "directive", "phase": "train", "round": number, "version": number - 1},
        span("pi-0", "computing", begin, begin + 900, number),
        {"t": begin + 900, **update, "client": "pi-0"},
        span("pi-1", "away", begin, begin + 1800, number),
        span("nano-0", "computing", begin, begin + 2700, number),
        {"t": begin + 2700, **update, "client": "nano-0"},
        {**version(number, loss), "t": HOUR * number},
    ]


def log(losses: Sequence[float | None] = LOSSES, *failures: str, method: str = "svd") -> str:
    events = [fleet(method=method), device("pi-0", "pi", 4), device("pi-1", "pi", 4, [2, 2])]
    events.append(device("nano-0", "nano", 2, [1, 3]))
    for number, loss in enumerate(losses, 1):
        events += round_of(number, loss)
    end = HOUR * len(losses)
    events += [{"t": end, "event": kind, "device": "pi-0"} for kind in failures]
    events.append({"t": end, "event": "end", "finished": True, "why": "all rounds are merged"})
    return "".join(json.dumps(event) + "\n" for event in events)


def story(losses: Sequence[float | None] = LOSSES, *failures: str) -> Story:
    return told(log(losses, *failures).splitlines(), "a log")


def write(folder: Path, losses: Sequence[float | None] = LOSSES, *failures: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_text(log(losses, *failures), encoding="utf-8")
    return folder
