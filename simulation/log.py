"""What a simulation writes down: events as they happen, one JSON object on a line, each with its virtual time `t` (s).

    {"t", "event": "fleet", "seed", "base", "devices", "rounds", "method", "floor"}           first of all
    {"t", "event": "device", "device", "group", "rank", "held", "layers", "precision", "plan", "examples", "data"}
                                                      when it has planned; `data` are its examples of each class
    {"t", "event": "directive", "phase", "round", "version"}
    {"t", "event": "span", "device", "kind", "from", "to", "round"}                             when the span ends
                                                      kind: computing, paused, sending, receiving, away
    {"t", "event": "update", "device", "round", "version", "held_out", "accuracy", "loss_first", "loss_last",
     "slowdown"}
    {"t", "event": "personal", "device", "held_out", "personal", "accuracy", "personal_accuracy"}
    {"t", "event": "crash", "device"}, {"t", "event": "dropout", "device", "to"}, {"t", "event": "server crash"}
    {"t", "event": "server", "what", …}               what the server records ("update", "merge" …), but no reports
    {"t", "event": "version", …}                      a row of rounds.csv
    {"t", "event": "spent", "device", "joules"}       at the end, of each device that took energy
    {"t", "event": "end", "finished", "why"}          last of all

The spans are in a table of their own as well, for a Gantt chart. Keys are sorted and numbers are written as Python
writes them: the same seed gives the same bytes.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILES = EVENTS, SPANS = "events.jsonl", "spans.csv"
BUFFERED = 1 << 20


class Log:
    """The event log of one run.

    Args:
        folder: where its files go.
    """

    def __init__(self, folder: Path) -> None:
        self._file, self._spans = (
            (folder / name).open("w", encoding="utf-8", buffering=BUFFERED, newline="") for name in FILES
        )
        self._table = csv.writer(self._spans, lineterminator="\n")
        self._table.writerow(["device", "kind", "from", "to", "round"])

    def write(self, at: float, event: str, **facts: Any) -> None:
        """Write an event down."""
        self._file.write(json.dumps({"t": at, "event": event, **facts}, sort_keys=True) + "\n")

    def span(self, device: str, kind: str, begin: float, end: float, number: int) -> None:
        """A device did this from then to then, for a round of that number."""
        self._table.writerow([device, kind, begin, end, number])
        self.write(end, "span", device=device, kind=kind, round=number, **{"from": begin, "to": end})

    def server(self, at: float, event: Mapping[str, Any]) -> None:
        """Write down what the server records."""
        if event["event"] != "report":
            # Its own number of the event, and its seconds of real work, are no part of what happened.
            facts = {key: value for key, value in event.items() if key not in {"event", "n", "seconds", "layers"}}
            self.write(at, "server", what=event["event"], **facts)

    def close(self) -> None:
        """Write what is left."""
        self._file.close()
        self._spans.close()
