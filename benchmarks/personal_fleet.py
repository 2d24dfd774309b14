"""A small fleet whose devices make adapters of their own, by each way; texts and model are those of `wire_fleet`.

Six devices of one rank hold labels in unequal shares; half of them take part in a round. What a device holds out is its
own, and in three parts of its texts one chooses between two adapters and another is reported, as on a real device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from benchmarks import wire_fleet
from benchmarks.wire_fleet import BATCH, Fleet
from edge_runtime import private, ways
from edge_runtime.lora import rebasing, slices
from edge_runtime.lora.adapter import Adapter, LayerSlot, Pair, Slot
from edge_runtime.lora.algebra import changed, cut, zero
from edge_runtime.lora.factors import exchanged, only
from edge_runtime.train.classify import Labelled
from edge_runtime.train.near import terms_of
from edge_runtime.train.own_texts import SHARE
from edge_runtime.train.receiving import Received
from edge_runtime.trainer import AdapterSpec, PersonalSpec, Training
from edge_runtime.wire import codec
from edge_runtime.wire.messages import Directive
from server import aggregators
from server.aggregators.beside import published
from server.aggregators.method import State, Update, fresh_state

RANK, DEVICES, TAKING_PART = 8, 6, 3
HELD_OUT = 0.3
"""Share of a device's texts that it does not train on."""
MOST = 48
"""Held-out texts of either kind, at most."""


class Kind(NamedTuple):
    """One way as it is tried: its name, the method of its fleet, and the strength of the pull."""

    way: str
    method: str = "increment"
    proximal: float = 0.0

    @property
    def name(self) -> str:
        """For the table."""
        return self.way + (f", pull {self.proximal}" if self.proximal else "")


@dataclass
class Device:
    """A device's texts, and what it keeps for itself. Not frozen: that changes from round to round."""

    train: Sequence[Labelled]
    reported: Sequence[Labelled]
    choosing: Sequence[Labelled]
    own: Adapter = field(default_factory=lambda: Adapter({}))
    change: Adapter = field(default_factory=lambda: Adapter({}))


class Losses(NamedTuple):
    """Of one device, on the texts that it reports; and which adapter it would leave with."""

    base: float
    merged: float
    personal: float
    keeps: bool

    @property
    def delivered(self) -> float:
        """The loss of the adapter that it leaves with."""
        return self.personal if self.keeps else self.merged


class Carried(NamedTuple):
    """Of one device: a personal change of an older version on the last one, and that version alone."""

    merged: float
    by_rows: float
    carried: float


def dealt(fleet: Fleet, seed: int) -> list[Device]:
    """The devices, their texts in an order by chance, in three parts."""
    found = []
    for name, (_, texts) in fleet.devices.items():
        order = np.random.default_rng([seed, *name.encode()]).permutation(len(texts))
        mixed = [texts[at] for at in order]
        held_out = max(SHARE, round(HELD_OUT * len(mixed)))
        choosing = held_out // SHARE
        reported = mixed[choosing:held_out]
        found.append(Device(mixed[held_out:] or mixed, reported[:MOST], mixed[: min(choosing, MOST)]))
    return found


class Life:
    """One fleet's rounds by a method, and what its devices then make for themselves.

    Args:
        fleet: from `wire_fleet.build`.
        method: of the table.
        steps: of a device in a round.
        seed: of the first version, of who takes part and of the order of texts.
    """

    def __init__(self, fleet: Fleet, method: str, steps: int, seed: int) -> None:
        self.fleet, self.steps, self.seed = fleet, steps, seed
        self.method, self.devices = aggregators.build(method), dealt(fleet, seed)
        self.state: State = fresh_state(fleet.shapes, self.method.server_rank(RANK), seed)
        self._private = self.method.asks(1).private

    def rounds(self, count: int) -> Iterator[int]:
        """That many rounds; after each its number."""
        for number in range(1, count + 1):
            asked = np.random.default_rng([self.seed, number]).permutation(DEVICES)[:TAKING_PART]
            sent = self.sent()
            updates = [self._update(int(at), sent, number) for at in sorted(asked)]
            self.state = self.method.combine(self.state, updates).state
            yield number

    def sent(self) -> Adapter:
        """The version, as devices decode it."""
        return codec.decode(codec.encode(published(self.state), "int8"))

    def made(self, kind: Kind, steps: int) -> list[Losses]:
        """What each device makes of the version by a way, from nothing of its own but its private part."""
        return [self._made(device, kind, steps) for device in self.devices]

    def personalise(self, kind: Kind, steps: int) -> list[Adapter]:
        """Each device's personal change of this version, kept; returns by how much each row moved."""
        found = []
        for device in self.devices:
            scene, start = self._start(device, kind)
            moved = self._trained(device, start, steps, kind.proximal, 0)
            device.change = rebasing.apart(slices.learnt(start.slices.seen, start.slices, moved), scene.received)
            found.append(moved)
        return found

    def carried(self, by_rows: Sequence[Adapter]) -> list[Carried]:
        """Kept changes on the version of now: as they are re-based, and laid over its rows as they are."""
        found = []
        for device, moved in zip(self.devices, by_rows, strict=True):
            received = self._received(device, self.sent())
            rows = {name: Pair(*_laid(received[name], by)) for name, by in moved.items()}
            ways_on = (received, Adapter({**received, **rows}), rebasing.carried(received, device.change))
            found.append(Carried(*(self._loss(adapter, device.reported) for adapter in ways_on)))
        return found

    def _received(self, device: Device, sent: Adapter) -> Adapter:
        if self._private:
            return exchanged(sent, rebasing.turned(device.own, sent, self._private), self._private)
        if not self.method.own:
            return sent
        pairs = {
            name: rebasing.of_rank(device.own.get(name, zero(pair.shape)), self.method.own, f"own:{name}")
            for name, pair in sent.items()
        }
        return rebasing.stacked(sent, pairs)

    def _update(self, at: int, sent: Adapter, number: int) -> Update:
        device, asks = self.devices[at], self.method.asks(number)
        received, own = self._received(device, sent), self.method.own
        rows = {name: range(RANK + own) for name in received}
        chosen = slices.lay_out(received, rows, number)
        start = ways.Start(chosen, asks.trained, Adapter({}))
        moved = self._trained(device, start, self.steps, 0.0, number)
        after = slices.learnt(received, chosen, moved)
        if self._private:
            device.own = after
        elif own:
            device.own = Adapter({name: rebasing.last(pair, own) for name, pair in after.items()})
        shared = only(private.shared(moved, chosen.directions, own)[0], asks.sent)
        before = Adapter({name: cut(chosen.before[name], pair.rank) for name, pair in shared.items()})
        trained = Adapter({name: changed(before[name], pair) for name, pair in shared.items()})
        return Update(f"device-{at}", float(min(len(device.train), self.steps * BATCH)), before, trained)

    def _start(self, device: Device, kind: Kind) -> tuple[ways.Scene, ways.Start]:
        received = self._received(device, self.sent())
        layers = {name: LayerSlot(*pair.shape, pair.rank, RANK) for name, pair in received.items()}
        asked = _directive(self._private, self.method.own, self.state.version)
        scene = ways.Scene(received, asked, Slot(layers), 0, Adapter({}))
        return scene, ways.WAYS[kind.way].begin(scene)

    def _made(self, device: Device, kind: Kind, steps: int) -> Losses:
        scene, start = self._start(device, kind)
        moved = self._trained(device, start, steps, kind.proximal, 0)
        personal = slices.learnt(start.slices.seen, start.slices, moved)
        nothing = Adapter({name: cut(pair, 1) for name, pair in scene.received.items()})
        nothing = Adapter({name: Pair(pair.a, 0 * pair.b) for name, pair in nothing.items()})
        base, merged, own = (self._loss(adapter, device.reported) for adapter in (nothing, scene.received, personal))
        before, after = (self._loss(adapter, device.choosing) for adapter in (scene.received, personal))
        return Losses(base, merged, own, after <= before)

    def _trained(self, device: Device, start: ways.Start, steps: int, proximal: float, number: int) -> Adapter:
        scaling = self.fleet.classifier.live.scaling
        received = Received(start.slices.before, {}, "")
        terms = terms_of(_training(proximal), received, None, scaling, start.away)
        with wire_fleet.attached(self.fleet, start.slices.seen, start.slices.rows) as found:
            order = self.seed * 1000 + number
            return wire_fleet.train(found, device.train, steps, order, self.fleet.learning_rate, terms, start.factors)[
                0
            ]

    def _loss(self, adapter: Adapter, texts: Sequence[Labelled]) -> float:
        return wire_fleet.evaluate(self.fleet, adapter, texts)[0]


def _laid(pair: Pair, by: Pair) -> tuple[np.ndarray, np.ndarray]:
    """A factor-wise change of the first rows, laid over a pair's first rows whatever they now are."""
    a, b = pair.a.copy(), pair.b.copy()
    a[: by.rank] += by.a
    b[:, : by.rank] += by.b
    return a, b


def _training(proximal: float) -> Training:
    return Training(
        max_steps=1, learning_rate=1.0, batch_size=BATCH, warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, seed=0,
        proximal=proximal,
    )  # fmt: skip


def _directive(kept: str, own: int, version: int) -> Directive:
    facts: Mapping[str, object] = {"private": kept, "personal": PersonalSpec()}
    spec = AdapterSpec(
        family="lora", target_modules=("query", "value"), scaling=1.0, max_rank=RANK, max_held=2 * RANK, hold_more=True,
        max_length=wire_fleet.LENGTH, own=own,
    )  # fmt: skip
    return Directive.model_validate(
        {
            "fleet": "f", "run": "r", "phase": "finish", "round": version, "version": version, "num_rounds": 1,
            "adapter": spec, "training": _training(0.0), "bands": (), "codec": "int8", **facts,
        }
    )  # fmt: skip
