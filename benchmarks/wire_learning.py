"""What each codec costs a fleet that learns: bytes up and held-out loss, same seeds, one process."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks import wire_fleet
from benchmarks.wire_fleet import Fleet
from edge_runtime.lora.adapter import Adapter
from edge_runtime.wire import feedback, update
from edge_runtime.wire.feedback import Residual
from edge_runtime.wire.update import Terms

BITS = 32


@dataclass(frozen=True)
class Way:
    """How updates travel in one run.

    Attributes:
        codec: of the table, or auto.
        part: with auto, the budget as a part of the numbers in fp32: 1 / part.
        feedback: whether error feedback is on.
    """

    codec: str
    part: float = 1.0
    feedback: bool = True

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.codec} 1/{self.part:g}" if self.codec == "auto" else self.codec


@dataclass
class Uplink:
    """The uplink of all devices of a fleet. Not frozen: each device has a residual.

    Attributes:
        way: how updates travel.
        residuals: device → what it owes.
        log: device, slice, change, of every update; for the measurement of speed.
    """

    way: Way
    residuals: dict[str, Residual] = field(default_factory=dict)
    log: list[tuple[Adapter, Adapter]] = field(default_factory=list)

    def exchange(self, device: str, received: Adapter, change: Adapter) -> tuple[Adapter, int]:
        """The change as it arrives, and the bytes of its blob."""
        made = update.make(change, received, self.residuals.get(device, feedback.NONE), self.terms(change))
        self.residuals[device] = made.residual
        self.log.append((received, change))
        return made.sent, len(made.payload)

    def terms(self, change: Adapter) -> Terms:
        """What this way asks for an update of that size."""
        budget = int(change.parameters * BITS / 8 / self.way.part)
        return Terms(self.way.codec, upload_bytes=budget, error_feedback=self.way.feedback)


@dataclass(frozen=True)
class Outcome:
    """One run of one fleet: final held-out loss and accuracy, and bytes up in all rounds."""

    loss: float
    accuracy: float
    bytes_up: int


def learn(
    fleet: Fleet, way: Way, *, rounds: int, steps: int, seed: int, say: Callable[[str], None]
) -> tuple[Outcome, Uplink]:
    """One fleet's life with updates that travel that way."""
    uplink, size, last = Uplink(way), 0, None
    for last in wire_fleet.run(fleet, uplink.exchange, rounds=rounds, steps=steps, seed=seed):
        size += last.bytes_up
    if last is None:
        raise ValueError("expected at least one round")
    say(f"seed {seed}, {way.name}{'' if way.feedback else ' without feedback'}: {last.loss:.4f}, {size} bytes")
    return Outcome(last.loss, last.accuracy, size), uplink


def increases(found: Mapping[Way, Sequence[Outcome]], way: Way, plain: Way) -> list[float]:
    """Of each seed, how much higher the final held-out loss is than with fp32, as a fraction."""
    return [one.loss / other.loss - 1 for one, other in zip(found[way], found[plain], strict=False)]


def ratio(found: Mapping[Way, Sequence[Outcome]], way: Way, plain: Way) -> float:
    """How many times fewer bytes than with fp32."""
    pairs = list(zip(found[way], found[plain], strict=False))
    return sum(other.bytes_up for _, other in pairs) / sum(one.bytes_up for one, _ in pairs)


def spread(values: Sequence[float]) -> float:
    """Standard error of the mean; NaN for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
