"""Who is here when: spans of time in which something is on (a device, or its plug), generated or from a file.

    always        from the beginning to the end
    exponential   on and off in turn, each for an exponentially distributed time
    diurnal       once a day, from about the same hour on, for about the same time; both edges vary from day to day
    file          what was recorded

A file is CSV with a header, or JSON: a list of objects. Each row has `device` and the hours `from` and `to`; rows of a
device are in order of time and do not overlap, and what is between them is off. With a column `on` (1 or 0) the rows of
a device must meet, so that a recording with gaps is not taken for one of absences.
"""

from __future__ import annotations

import csv
import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.errors import DataError
from simulation.draws import named
from simulation.settings import Availability

HOUR, DAY = 3600.0, 86400.0
FOREVER = float("inf")

Span = tuple[float, float]
"""From and to, in seconds; half open."""


class Trace:
    """Spans of one device, made as far as somebody looks.

    Args:
        spans: those in which it is on, in order, apart from each other; each ends after it begins.
    """

    def __init__(self, spans: Iterable[Span]) -> None:
        self._spans = iter(spans)
        self._known: list[Span] = []

    def is_on(self, now: float) -> bool:
        """Whether it is on."""
        begin, end = self._around(now)
        return begin <= now < end

    def next_change(self, now: float) -> float:
        """When it goes on or off next, after `now`; infinity for never."""
        begin, end = self._around(now)
        return end if begin <= now else begin

    def _around(self, now: float) -> Span:
        """The span that `now` is in, or else the next one."""
        while not self._known or self._known[-1][1] <= now:
            following = next(self._spans, None)
            if following is None:
                return FOREVER, FOREVER
            self._known.append(following)
        return self._known[bisect_right(self._known, now, key=lambda span: span[1])]


def trace(settings: Availability, seed: int, device: str, recorded: Mapping[str, Sequence[Span]]) -> Trace:
    """The trace of a device.

    Args:
        settings: how it is made.
        seed: of the simulation.
        device: its name, and what the trace is of.
        recorded: device → spans, of the settings' file.

    Raises:
        DataError: the file has no rows of this device.
    """
    if settings.kind == "file":
        name = device.partition("/")[0]
        if name not in recorded:
            known = ", ".join(sorted(recorded)[:5])
            raise DataError(f"{settings.file} has no rows of '{name}'; found those of {len(recorded)} devices: {known}")
        return Trace(recorded[name])
    if settings.kind == "exponential":
        return Trace(_exponential(settings, named(seed, "trace", device)))
    if settings.kind == "diurnal":
        return Trace(_diurnal(settings, named(seed, "trace", device)))
    return Trace([(0.0, FOREVER)])


def _exponential(settings: Availability, draw: np.random.Generator) -> Iterator[Span]:
    mean_on, mean_off, now = HOUR * settings.on_hours, HOUR * settings.off_hours, 0.0
    if draw.random() >= mean_on / (mean_on + mean_off):
        now += draw.exponential(mean_off)
    while True:
        end = now + max(1.0, draw.exponential(mean_on))
        yield now, end
        now = end + max(1.0, draw.exponential(mean_off))


def _diurnal(settings: Availability, draw: np.random.Generator) -> Iterator[Span]:
    begin, spread, last = HOUR * settings.from_hour, HOUR * settings.spread_hours, 0.0
    day = -1  # the night before the first day reaches into it
    while True:
        start = day * DAY + begin + spread * draw.standard_normal()
        end = start + HOUR * settings.on_hours + spread * draw.standard_normal()
        start, day = max(start, last), day + 1
        if end > start + 1.0:
            yield start, end
            last = end + 1.0


def read(path: Path) -> dict[str, list[Span]]:
    """Device → spans in seconds, from a file.

    Raises:
        DataError: no such file, not of that form, a time that is no number, one that runs backwards, spans that
            overlap, or a gap where the file says what is on and what is off; names the line.
    """
    rows = _json(path) if path.suffix == ".json" else _csv(path)
    found: dict[str, list[Span]] = {}
    last: dict[str, float] = {}
    for where, row in rows:
        device = str(row.get("device", ""))
        if not device:
            raise DataError(f"{where}: expected a device's name in 'device'; found {dict(row)!r:.120}")
        begin, end = _hours(row, "from", where), _hours(row, "to", where)
        before = last.get(device)
        if end <= begin:
            raise DataError(
                f"{where}: time runs backwards: '{device}' from {begin} to {end} h; 'to' comes after 'from'"
            )
        if before is not None and begin < before:
            raise DataError(
                f"{where}: time runs backwards: '{device}' from {begin} h, after a row to {before} h; sort the rows, "
                "and join those that overlap"
            )
        is_on = _on(row, where)
        if is_on is not None and before is not None and begin > before:
            raise DataError(
                f"{where}: a gap: nothing says what '{device}' was from {before} to {begin} h; fill it in, or leave "
                "out the column 'on' and the rows that are off"
            )
        last[device] = end
        spans = found.setdefault(device, [])
        if is_on is not False:
            if spans and spans[-1][1] == begin * HOUR:
                begin = spans.pop()[0] / HOUR
            spans.append((begin * HOUR, end * HOUR))
    if not found:
        raise DataError(f"{path} has no rows; expected at least one device")
    return found


def _on(row: Mapping[str, Any], where: str) -> bool | None:
    if row.get("on") is None:
        return None
    text = str(row["on"]).strip().lower()
    if text not in {"0", "1", "true", "false"}:
        raise DataError(f"{where}: expected 1 or 0 in 'on'; found {row['on']!r}")
    return text in {"1", "true"}


def _hours(row: Mapping[str, Any], key: str, where: str) -> float:
    try:
        value = float(row[key])
    except (KeyError, TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise DataError(f"{where}: expected hours of 0 or more in '{key}'; found {row.get(key)!r}")
    return value


def _csv(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    text = _text(path)
    reader = csv.DictReader(text.splitlines())
    missing = {"device", "from", "to"} - set(reader.fieldnames or ())
    if missing:
        raise DataError(f"{path}: expected a header with device, from and to; found {reader.fieldnames}")
    for row in reader:
        yield f"{path}, line {reader.line_num}", row


def _json(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        rows = json.loads(_text(path))
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects; found {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(f"{path}, entry {number}: expected an object; found {row!r:.80}")
        yield f"{path}, entry {number}", row


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"a file of availability was expected at {path}; found: {error}") from error
