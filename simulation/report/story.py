"""A run as its event log tells it: who planned what, what each device did when, and what was merged."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from edge_runtime.errors import DataError
from simulation.tables import VersionRow

FAILURES = ("crash", "dropout", "server crash")
Judgement = tuple[float, float | None]
"""A device's loss on what it holds out, and accuracy where it is known."""


@dataclass(frozen=True)
class Planned:
    """A device with the last plan that it made.

    Attributes:
        device: its name.
        group: of the fleet's file.
        rank: directions that it trains.
        held: directions that it holds.
        layers: that it trains.
        precision: of its base.
        examples: its own.
        data: its examples of each class; empty where the log does not know them.
    """

    device: str
    group: str
    rank: int
    held: int
    layers: int
    precision: str
    examples: int
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bar:
    """A device did one thing from then to then (s of virtual time), for a round of that number."""

    device: str
    kind: str
    begin: float
    end: float
    round: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """An update that the server accepted, at a virtual time (s), trained from a version so many merges old."""

    device: str
    round: int
    at: float
    age: int


@dataclass(frozen=True, slots=True)
class Own:
    """A device's personal adapter beside the last global one: loss and accuracy of each on what it holds out."""

    device: str
    held_out: float
    personal: float
    accuracy: float | None
    personal_accuracy: float | None


@dataclass(frozen=True)
class Story:
    """A run.

    Attributes:
        base: the model that plans, times and bytes are of.
        method: of aggregation.
        asked: rounds that were asked for.
        floor: the least loss that there is; None where nobody knows.
        devices: all that planned, in the order in which they did.
        versions: a row for each merge.
        bars: in the order in which they ended.
        arrivals: in the order of time.
        begun: round → when its first Directive went out (s).
        failures: kind → how many.
        seconds: virtual time at the end.
        finished: whether all rounds were merged.
        why: in words; empty for a run that was interrupted.
        own: a personal adapter of each device that made one.
        joules: device → its share of the energy, of those that took any.
        twice: of each device that trained more than once, loss and accuracy of what it received the first and the last
            time: on the same held-out examples, where the mean of a round is over those that were asked.
    """

    base: str
    method: str
    asked: int
    floor: float | None
    devices: Sequence[Planned]
    versions: Sequence[VersionRow]
    bars: Sequence[Bar]
    arrivals: Sequence[Arrival]
    begun: Mapping[int, float]
    failures: Mapping[str, int]
    seconds: float
    finished: bool
    why: str
    own: Sequence[Own] = ()
    joules: Mapping[str, float] = field(default_factory=dict)
    twice: Sequence[tuple[Judgement, Judgement]] = ()

    @property
    def groups(self) -> Mapping[str, str]:
        """Device → its group."""
        return {each.device: each.group for each in self.devices}


@dataclass
class _Heard:
    """A story as far as it has been read."""

    head: Mapping[str, Any] = field(default_factory=dict)
    end: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    devices: dict[str, Planned] = field(default_factory=dict)
    versions: list[VersionRow] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    arrivals: list[Arrival] = field(default_factory=list)
    begun: dict[int, float] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    own: dict[str, Own] = field(default_factory=dict)
    joules: dict[str, float] = field(default_factory=dict)
    judged: dict[str, list[Judgement]] = field(default_factory=dict)


def _fleet(heard: _Heard, event: Mapping[str, Any]) -> None:
    heard.head = event


def _device(heard: _Heard, event: Mapping[str, Any]) -> None:
    data = event["data"]
    heard.devices[event["device"]] = Planned(
        event["device"], event["group"], event["rank"], event["held"], event["layers"], event["precision"],
        event["examples"], tuple(data) if isinstance(data, list) else (),
    )  # fmt: skip


def _directive(heard: _Heard, event: Mapping[str, Any]) -> None:
    if event["phase"] == "train":
        heard.begun.setdefault(event["round"], event["t"])


def _span(heard: _Heard, event: Mapping[str, Any]) -> None:
    heard.bars.append(Bar(event["device"], event["kind"], event["from"], event["to"], event["round"]))


def _server(heard: _Heard, event: Mapping[str, Any]) -> None:
    if event["what"] == "update":
        heard.arrivals.append(Arrival(event["client"], event["round"], event["t"], event["age"]))


def _version(heard: _Heard, event: Mapping[str, Any]) -> None:
    # What an older package did not write is what the row has for it.
    told_of = {entry.name: event[entry.name] for entry in fields(VersionRow) if entry.name in event}
    heard.versions.append(VersionRow(**told_of))


def _update(heard: _Heard, event: Mapping[str, Any]) -> None:
    found = heard.judged.setdefault(event["device"], [])
    # The first and the last are enough.
    found[1:] = [(event["held_out"], event.get("accuracy"))]


def _personal(heard: _Heard, event: Mapping[str, Any]) -> None:
    heard.own[event["device"]] = Own(
        event["device"], event["held_out"], event["personal"], event.get("accuracy"), event.get("personal_accuracy")
    )


def _spent(heard: _Heard, event: Mapping[str, Any]) -> None:
    heard.joules[event["device"]] = event["joules"]


def _failure(heard: _Heard, event: Mapping[str, Any]) -> None:
    heard.failures[event["event"]] += 1


def _end(heard: _Heard, event: Mapping[str, Any]) -> None:
    heard.end = event


EVENTS: Mapping[str, Callable[[_Heard, Mapping[str, Any]], None]] = {
    "fleet": _fleet,
    "device": _device,
    "directive": _directive,
    "span": _span,
    "server": _server,
    "version": _version,
    "update": _update,
    "personal": _personal,
    "spent": _spent,
    "end": _end,
    **dict.fromkeys(FAILURES, _failure),
}


def told(lines: Iterable[str], source: str) -> Story:
    """The story that an event log tells; events that it does not need are passed over.

    Args:
        lines: of the log.
        source: what to call it in an error.

    Raises:
        DataError: a line that is no event of a simulation, or a log that does not begin with its fleet.
    """
    heard = _Heard()
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            heard.seconds = float(event["t"])
            if event["event"] in EVENTS:
                EVENTS[event["event"]](heard, event)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{source}:{number}: expected an event of a simulation, found {line.strip()[:80]!r} ({error!r}); a run "
                "that was interrupted has such a line: end it by the same `edge-runtime simulate`"
            ) from error
    if not heard.head:
        raise DataError(f"{source}: expected a simulation's event log, whose first line is its fleet; found none")
    head = heard.head
    return Story(
        head["base"], head["method"], head["rounds"], head["floor"], tuple(heard.devices.values()),
        tuple(heard.versions), tuple(heard.bars), tuple(heard.arrivals), heard.begun, heard.failures, heard.seconds,
        bool(heard.end.get("finished")), str(heard.end.get("why", "")), tuple(heard.own.values()), heard.joules,
        tuple((found[0], found[1]) for found in heard.judged.values() if len(found) > 1),
    )  # fmt: skip
