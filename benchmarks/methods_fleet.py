"""A small fleet that learns by one method; the devices are those of `wire_fleet`, or of `answers_fleet`.

Some of the devices take part in a round, the same ones by every method. A device does what a Directive of the
method would ask of it: it holds what the method permits, trains and returns the factors that it names, keeps the
private factor or its own directions, trains a core, prunes its ranks. The global adapter goes down in int8, updates
come up as they are.

A life is a generator: it asks for trainings and judgings and is given what came of them, so that many lives can go
through one model side by side (`together`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from benchmarks.together import Judging, Texts, Training
from edge_runtime.lora import pruning, slices
from edge_runtime.lora.adapter import Adapter, LayerSlot, Pair, Slot
from edge_runtime.lora.algebra import changed, cut, fresh_rows, take
from edge_runtime.lora.factors import exchanged, numbers_in, only
from edge_runtime.schedule import rate_afterwards, rate_in
from edge_runtime.train.cores import CORE
from edge_runtime.wire import codec
from server import aggregators
from server.aggregators.beside import published
from server.aggregators.method import Aggregator, Asks, State, Update

SEEN_BY_EACH = 256
"""Held-out texts that each device's part of the global model is judged by."""
PERSONAL_STEPS = 8
SMALLEST, LARGEST = -1, 32
LAST = 4
"""Rounds that a life is judged by: with five devices of unequal labels, one round is a matter of who takes part."""


class Fleet(Protocol):
    """Devices and texts; `wire_fleet.Fleet` says what each is."""

    @property
    def devices(self) -> Mapping[str, tuple[int, Texts]]: ...  # noqa: D102 - as above
    @property
    def held_out(self) -> Texts: ...  # noqa: D102 - as above
    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]: ...  # noqa: D102 - as above
    @property
    def taking_part(self) -> int: ...  # noqa: D102 - as above
    @property
    def batch(self) -> int: ...  # noqa: D102 - as above


@dataclass(frozen=True)
class Way:
    """One method as a fleet runs it.

    Attributes:
        method: of the table.
        rank: of every device, where the method needs equal ranks or the question does; SMALLEST for that of the
            smallest device, 0 for each device's own.
        holds: what devices hold beyond what they train: nothing ("prefix") or all directions ("all"), whatever the
            method says of it; "" for what it says.
        central: whether one device has all texts, and takes the steps of all that would take part.
        slice: the policy by which devices choose what they train, where the method leaves that to them.
        falls: how the learning rate falls from round to round; see `edge_runtime.schedule`.
    """

    method: str
    rank: int = 0
    holds: Literal["", "prefix", "all"] = ""
    central: bool = False
    slice: str = "top"
    falls: str = "constant"

    @property
    def name(self) -> str:
        """For the table."""
        more = ["smallest rank"] if self.rank == SMALLEST else [f"rank {self.rank}"] if self.rank else []
        more += {"": [], "prefix": ["prefix only"], "all": ["holds all"]}[self.holds]
        more += [self.slice] if self.slice != "top" else []
        more += [f"{self.falls} fall"] if self.falls != "constant" else []
        more += ["centralised"] if self.central else []
        return ", ".join([self.method, *more])


class Rate(NamedTuple):
    """The rate of a device of rank r is `largest` times (LARGEST / r) to the power of `exponent`, in every fleet."""

    largest: float
    exponent: float


@dataclass
class Device:
    """What one device remembers from round to round. Not frozen for that reason."""

    rank: int
    texts: Texts
    held_out: Texts
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


Asking = Generator[list[Training] | list[Judging], list[Any], "Ended"]
"""Asks for trainings, and is given the changes of the trained rows; or for judgings: pairs of loss and accuracy."""


class Life:
    """One fleet's life by one method.

    Args:
        fleet: the devices, and the texts that the global model is judged by.
        way: by which they learn.
        steps: optimiser steps of a device in a round.
        seed: of the first adapter, of who takes part, and of the order of texts.
        rate: how fast devices learn.
    """

    def __init__(self, fleet: Fleet, way: Way, *, steps: int, seed: int, rate: Rate) -> None:
        self.fleet, self.way, self.steps, self.seed, self.rate = fleet, way, steps, seed, rate
        self.method: Aggregator = aggregators.build(way.method)
        self.devices = {}
        least = min(rank for rank, _ in fleet.devices.values())
        dealt = fleet.devices
        if way.central:
            everything = [text for _, texts in fleet.devices.values() for text in texts]
            dealt, self.steps = {"all": (way.rank, everything)}, steps * fleet.taking_part
        for name, (rank, texts) in dealt.items():
            own, rest = texts[::5], [text for at, text in enumerate(texts) if at % 5]
            found = min(least, rank) if way.rank == SMALLEST else way.rank or rank
            self.devices[name] = Device(found, rest or list(texts), own)
        self.largest = max(device.rank for device in self.devices.values())
        self.seen_by_each = fleet.held_out[:SEEN_BY_EACH]
        self.numbers_up = self.numbers_down = self.rounds = 0

    def run(self, rounds: int, every: int, *, whole: bool = True) -> Asking:
        """All rounds, and what they came to; losses are infinite from the round on in which a device diverged.

        Args:
            rounds: how many.
            every: judge the global model each so many rounds, and after the last ones.
            whole: judge what devices hold and their personal models as well; without a global product, it is done.
        """
        self.rounds = rounds
        state, points, seconds = self.method.init(self._shapes(), self._rank(), self.seed), {}, 0.0
        for number in range(1, rounds + 1):
            sent = self._sent(state)
            asked = np.random.default_rng([self.seed, number]).permutation(sorted(self.devices))[
                : self.fleet.taking_part
            ]
            names = sorted(str(name) for name in asked)
            begun = [self._begun(self.devices[name], sent, number) for name in names]
            self.numbers_down += sum(one.seen.parameters - self._own_in(one) for one in begun)
            moved = yield [
                self._training(self.devices[name], one, number, self.steps)
                for name, one in zip(names, begun, strict=True)
            ]
            if not all(_finite(change) for change in moved):
                lost = Point(math.inf, 0.0)
                return Ended({number: lost}, lost, lost, self.numbers_up, self.numbers_down, seconds)
            updates = [self._update(*found, number) for found in zip(names, begun, moved, strict=True)]
            started = time.perf_counter()
            state = self.method.combine(state, updates).state
            seconds += time.perf_counter() - started
            if number > rounds - LAST or number % every == 0:
                [found] = yield [Judging(published(state), self.fleet.held_out)]
                points[number] = Point(*found)
        last, unknown = self._sent(state), Point(math.nan, math.nan)
        if not (whole or self.method.private):
            return Ended(points, unknown, unknown, self.numbers_up, self.numbers_down, seconds)
        as_held = yield from self._as_devices_see(last)
        personal = yield from self._personal(last, rounds)
        return Ended(points, as_held, personal, self.numbers_up, self.numbers_down, seconds)

    def _rank(self) -> int:
        return self.method.server_rank(self.largest)

    def _shapes(self) -> dict[str, tuple[int, int]]:
        if not self.method.core:
            return dict(self.fleet.shapes)
        return {f"{name}.{CORE}": (self.largest, self.largest) for name in self.fleet.shapes}

    def _sent(self, state: State) -> Adapter:
        return codec.decode(codec.encode(published(state), "int8"))

    def _received(self, device: Device, sent: Adapter, asks: Asks) -> Adapter:
        """What a device reads of a version, with its own factor in it."""
        layers = {}
        for name, pair in sent.items():
            trained = min(device.rank, pair.rank - self.method.beside)
            whole = self.method.hold_more if not self.way.holds else self.way.holds == "all"
            held = pair.rank if whole else self.method.beside + trained
            layers[name] = LayerSlot(*pair.shape, held, trained)
        mine = self.method.fit(sent, Slot(layers))
        return exchanged(mine, device.own, asks.private) if asks.private else mine

    def _begun(self, device: Device, sent: Adapter, number: int) -> slices.Slices:
        """What a device holds and trains of what was sent."""
        received = self._received(device, sent, self.method.asks(number))
        ranks = {name: min(device.rank, pair.rank - self.method.beside) for name, pair in received.items()}
        if device.ranks is not None:
            ranks = {name: min(rank, device.ranks.get(name, rank)) for name, rank in ranks.items()}
            received = pruning.narrowed(received, ranks)
        policy = self.method.slice or self.way.slice
        chosen = slices.lay_out(received, slices.choose(policy, received, ranks, number - 1), number - 1)
        return _with_own(chosen, device.own, self.method.own) if self.method.own else chosen

    def _own_in(self, begun: slices.Slices) -> int:
        """Numbers of the device's own directions, which never travel."""
        return self.method.own * sum(sum(begun.seen[name].shape) for name in begun.rows)

    def _training(self, device: Device, begun: slices.Slices, number: int, steps: int) -> Training:
        facts = self.method.training
        return Training(
            begun.seen,
            begun.rows,
            device.texts,
            steps,
            self.seed * 1000 + number,
            self._rate(device, number),
            self.method.asks(number).trained,
            facts.get("kept", 1.0),
            facts.get("tail_penalty", 0.0),
        )

    def _rate(self, device: Device, number: int) -> float:
        """The learning rate of a device in a round; after the last one it trains for itself."""
        falls, rounds = self.way.falls, self.rounds
        share = rate_in(number, rounds=rounds, schedule=falls) if number <= rounds else rate_afterwards(falls)
        return float(share * self.rate.largest * (LARGEST / device.rank) ** self.rate.exponent)

    def _update(self, name: str, begun: slices.Slices, moved: Adapter, number: int) -> Update:
        device, asks = self.devices[name], self.method.asks(number)
        after = Adapter({layer: changed(begun.before[layer], by) for layer, by in moved.items()})
        if asks.private:
            device.own = after
        if self.method.own:
            device.own = Adapter({layer: _last(pair, self.method.own) for layer, pair in after.items()})
            moved = Adapter({layer: cut(pair, pair.rank - self.method.own) for layer, pair in moved.items()})
        kept = self.method.training.get("kept", 1.0)
        if kept < 1:
            device.ranks = pruning.pruned(Adapter({layer: begun.before[layer] for layer in after}), after, kept)
        up = only(moved, asks.sent)
        self.numbers_up += numbers_in(up.sizes, asks.sent)
        before = Adapter({layer: cut(begun.before[layer], pair.rank) for layer, pair in up.items()})
        trained = Adapter({layer: changed(before[layer], pair) for layer, pair in up.items()})
        return Update(name, float(min(len(device.texts), self.steps * self.fleet.batch)), before, trained)

    def _as_devices_see(self, sent: Adapter) -> Generator[list[Judging], list[Any], Point]:
        asks = self.method.asks(1)
        held = {received.digest(): received for received in self._all_received(sent, asks)}
        found = yield [Judging(received, self.seen_by_each) for received in held.values()]
        known = dict(zip(held, found, strict=True))
        return _mean([known[received.digest()] for received in self._all_received(sent, asks)])

    def _all_received(self, sent: Adapter, asks: Asks) -> list[Adapter]:
        return [self._received(device, sent, asks) for device in self.devices.values()]

    def _personal(self, sent: Adapter, rounds: int) -> Generator[Any, list[Any], Point]:
        devices, number = list(self.devices.values()), rounds + 1
        begun = [self._begun(device, sent, number) for device in devices]
        moved = yield [
            self._training(device, one, number, PERSONAL_STEPS) for device, one in zip(devices, begun, strict=True)
        ]
        found = yield [
            Judging(slices.learnt(one.seen, one, change), device.held_out)
            for device, one, change in zip(devices, begun, moved, strict=True)
        ]
        return _mean(found)


def _with_own(chosen: slices.Slices, own: Adapter, count: int) -> slices.Slices:
    """A slice with directions of the device's own behind it, all of them trained."""
    seen, rows, before = dict(chosen.seen), dict(chosen.rows), dict(chosen.before)
    for name, trained in chosen.rows.items():
        fleet = chosen.seen[name]
        mine = own[name] if name in own else _fresh(name, fleet, count)
        seen[name], before[name] = _joined(fleet, mine), _joined(chosen.before[name], mine)
        rows[name] = (*trained, *range(fleet.rank, fleet.rank + count))
    return slices.Slices(Adapter(seen), rows, chosen.directions, Adapter(before))


def _fresh(name: str, like: Pair, count: int) -> Pair:
    d_out, d_in = like.shape
    return Pair(fresh_rows(np.zeros((0, d_in), np.float32), count, f"own:{name}"), np.zeros((d_out, count), np.float32))


def _joined(first: Pair, then: Pair) -> Pair:
    return Pair(np.concatenate([first.a, then.a]), np.concatenate([first.b, then.b], axis=1))


def _last(pair: Pair, count: int) -> Pair:
    return take(pair, range(pair.rank - count, pair.rank))


def _finite(change: Adapter) -> bool:
    return all(np.isfinite(pair.a).all() and np.isfinite(pair.b).all() for pair in change.values())


def _mean(points: Sequence[tuple[float, float]]) -> Point:
    return Point(*(float(np.mean(values)) for values in zip(*points, strict=True)))
