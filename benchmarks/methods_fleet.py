"""A small fleet that learns by one method; the devices are those of `wire_fleet`.

Of the ten devices half take part in a round, the same ones by every method. A device does what a Directive of the
method would ask of it: it holds what the method permits, trains and returns the factors that it names, keeps the
private one, prunes its ranks. The global adapter goes down in int8, updates come up as they are.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from benchmarks import wire_fleet
from benchmarks.wire_fleet import BATCH, Fleet
from edge_runtime.lora import pruning, slices
from edge_runtime.lora.adapter import Adapter, LayerSlot, Slot
from edge_runtime.lora.algebra import changed
from edge_runtime.lora.factors import exchanged, numbers_in, only
from edge_runtime.train.classify import Labelled
from edge_runtime.train.terms import Term, tail
from edge_runtime.wire import codec
from server import aggregators
from server.aggregators.beside import published
from server.aggregators.method import Aggregator, Asks, State, Update

TAKING_PART = 5
SEEN_BY_EACH = 256
"""Held-out texts that each device's part of the global model is judged by."""
PERSONAL_STEPS = 8
SMALLEST = -1
LAST = 4
"""Rounds that a life is judged by: with five devices of unequal labels, one round is a matter of who takes part."""


@dataclass(frozen=True)
class Way:
    """One method as a fleet runs it.

    Attributes:
        method: of the table.
        rank: of every device, where the method needs equal ranks or the question does; SMALLEST for that of the
            smallest device, 0 for each device's own.
        prefix: whether devices hold no more than they train, although the method would let them.
        central: whether one device has all texts, and takes the steps of all that would take part.
        facts: parameters of the method.
    """

    method: str
    rank: int = 0
    prefix: bool = False
    central: bool = False
    facts: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """For the table."""
        more = ["smallest rank"] if self.rank == SMALLEST else [f"rank {self.rank}"] if self.rank else []
        more += ["prefix only"] if self.prefix else []
        more += ["centralised"] if self.central else []
        return ", ".join([self.method, *more, *(f"{key} {value}" for key, value in self.facts)])


class Rate(NamedTuple):
    """The rate of a device of rank r is `largest` times (largest rank / r) to the power of `exponent`."""

    largest: float
    exponent: float


@dataclass
class Device:
    """What one device remembers from round to round. Not frozen for that reason."""

    rank: int
    texts: Sequence[Labelled]
    held_out: Sequence[Labelled]
    own: Adapter = field(default_factory=lambda: Adapter({}))
    ranks: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Point:
    """What a version is worth: held-out loss in nats and accuracy."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Ended:
    """What a fleet's life came to.

    Attributes:
        rounds: round → the global model after it, with all that is published.
        devices: mean over devices of that on the common held-out texts, each with what it holds of the last version.
        personal: mean over devices on their own held-out texts, after some steps more on their own data.
        numbers_up, numbers_down: of all updates, and of what their devices received.
        merge_seconds: of all merges.
    """

    rounds: Mapping[int, Point]
    devices: Point
    personal: Point
    numbers_up: int
    numbers_down: int
    merge_seconds: float


class Life:
    """One fleet's life by one method."""

    def __init__(self, fleet: Fleet, way: Way, *, steps: int, seed: int, rate: Rate) -> None:
        self.fleet, self.way, self.steps, self.seed, self.rate = fleet, way, steps, seed, rate
        self.method: Aggregator = aggregators.build(way.method, **dict(way.facts))
        self.devices = {}
        least = min(rank for rank, _ in fleet.devices.values())
        dealt = fleet.devices
        if way.central:
            everything = [text for _, texts in fleet.devices.values() for text in texts]
            dealt, self.steps = {"all": (way.rank, everything)}, steps * TAKING_PART
        for name, (rank, texts) in dealt.items():
            own, rest = texts[::5], [text for at, text in enumerate(texts) if at % 5]
            found = min(least, rank) if way.rank == SMALLEST else way.rank or rank
            self.devices[name] = Device(found, rest or list(texts), own)
        self.largest = max(device.rank for device in self.devices.values())
        self.numbers_up = self.numbers_down = 0

    def run(self, rounds: int, every: int) -> Ended:
        """All rounds, and what they came to."""
        state, points, seconds = self.method.init(self.fleet.shapes, self._rank(), self.seed), {}, 0.0
        for number in range(1, rounds + 1):
            sent = self._sent(state)
            asked = np.random.default_rng([self.seed, number]).permutation(sorted(self.devices))[:TAKING_PART]
            updates = [self._update(str(name), sent, number) for name in sorted(asked)]
            started = time.perf_counter()
            state = self.method.combine(state, updates).state
            seconds += time.perf_counter() - started
            if number > rounds - LAST or number % every == 0:
                points[number] = Point(*wire_fleet.evaluate(self.fleet, published(state)))
        last = self._sent(state)
        return Ended(
            points,
            self._as_devices_see(last),
            self._personal(last, rounds),
            self.numbers_up,
            self.numbers_down,
            seconds,
        )

    def _rank(self) -> int:
        return self.method.server_rank(self.largest)

    def _sent(self, state: State) -> Adapter:
        return codec.decode(codec.encode(published(state), "int8"))

    def _received(self, device: Device, sent: Adapter, asks: Asks) -> Adapter:
        """What a device reads of a version, with its own factor in it."""
        layers = {}
        for name, pair in sent.items():
            trained = min(device.rank, pair.rank - self.method.beside)
            whole = self.method.hold_more and not self.way.prefix
            held = pair.rank if whole else self.method.beside + trained
            layers[name] = LayerSlot(*pair.shape, held, trained)
        mine = self.method.fit(sent, Slot(layers))
        return exchanged(mine, device.own, asks.private) if asks.private else mine

    def _update(self, name: str, sent: Adapter, number: int) -> Update:
        device, asks = self.devices[name], self.method.asks(number)
        received = self._received(device, sent, asks)
        self.numbers_down += received.parameters
        moved, chosen = self._trained(device, received, asks, number, self.steps)
        self._remember(device, chosen, moved, asks)
        up = only(moved, asks.sent)
        self.numbers_up += numbers_in(up.sizes, asks.sent)
        trained = Adapter({layer: changed(chosen.before[layer], pair) for layer, pair in up.items()})
        before = Adapter({layer: chosen.before[layer] for layer in trained})
        return Update(name, float(min(len(device.texts), self.steps * BATCH)), before, trained)

    def _trained(
        self, device: Device, received: Adapter, asks: Asks, number: int, steps: int
    ) -> tuple[Adapter, slices.Slices]:
        ranks = {name: min(device.rank, pair.rank - self.method.beside) for name, pair in received.items()}
        if device.ranks is not None:
            ranks = {name: min(rank, device.ranks.get(name, rank)) for name, rank in ranks.items()}
            received = pruning.narrowed(received, ranks)
        policy = self.method.slice or "top"
        chosen = slices.lay_out(received, slices.choose(policy, received, ranks, number - 1), number - 1)
        terms: list[Term] = []
        facts = self.method.training
        scaling = self.fleet.classifier.live.scaling
        if facts.get("tail_penalty"):
            terms.append(tail(facts["kept"], facts["tail_penalty"], scaling))
        with wire_fleet.attached(self.fleet, chosen.seen, chosen.rows) as found:
            order = self.seed * 1000 + number
            rate = self.rate.largest * (self.largest / device.rank) ** self.rate.exponent
            moved, _ = wire_fleet.train(found, device.texts, steps, order, rate, terms, asks.trained)
        return moved, chosen

    def _remember(self, device: Device, chosen: slices.Slices, moved: Adapter, asks: Asks) -> None:
        after = Adapter({name: changed(chosen.before[name], by) for name, by in moved.items()})
        if asks.private:
            device.own = after
        kept = self.method.training.get("kept", 1.0)
        if kept < 1:
            device.ranks = pruning.pruned(Adapter({name: chosen.before[name] for name in after}), after, kept)

    def _as_devices_see(self, sent: Adapter) -> Point:
        asks = self.method.asks(1)
        texts = self.fleet.held_out[:SEEN_BY_EACH]
        found = [
            wire_fleet.evaluate(self.fleet, self._received(device, sent, asks), texts)
            for device in self.devices.values()
        ]
        return Point(*(float(np.mean(values)) for values in zip(*found, strict=True)))

    def _personal(self, sent: Adapter, rounds: int) -> Point:
        found = []
        for device in self.devices.values():
            asks = self.method.asks(rounds + 1)
            received = self._received(device, sent, asks)
            moved, chosen = self._trained(device, received, asks, rounds + 1, PERSONAL_STEPS)
            found.append(wire_fleet.evaluate(self.fleet, slices.learnt(chosen.seen, chosen, moved), device.held_out))
        return Point(*(float(np.mean(values)) for values in zip(*found, strict=True)))
