"""A small fleet that learns by one way of choosing what devices train; the devices are those of `wire_fleet`.

Half of the ten devices take part in a round, the same ones by every way. All hold the whole global adapter, as they
decoded it from int8 bands; a device trains as many numbers as its rank says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks import wire_fleet
from benchmarks.wire_fleet import BATCH, Fleet
from edge_runtime.lora import allocation, slices
from edge_runtime.lora.adapter import Adapter, LayerSlot, Slot
from edge_runtime.lora.algebra import changed
from edge_runtime.lora.slices import Scores, Slices
from edge_runtime.train import classify, drift, live
from edge_runtime.train.alignment import BATCHES, sized, watching
from edge_runtime.train.classify import Labelled
from edge_runtime.train.resume import RoundState, StepReport
from edge_runtime.train.terms import Term, proximal, push
from edge_runtime.wire import codec
from server.aggregators.increment import increment
from server.aggregators.method import Update, fresh_state

RANKS = (2, 2, 2, 2, 4, 4, 4, 8, 16, 32)
GLOBAL_RANK = 2 * max(RANKS)
TAKING_PART = 5


@dataclass(frozen=True)
class Way:
    """What a fleet asks of its devices; fields as in the configuration, and which layers it adapts."""

    slice: str = "top"
    allocation: str = "uniform"
    proximal: float = 0.0
    correction: float = 0.0
    every_linear: bool = False

    @property
    def name(self) -> str:
        """For the table: what is not the default."""
        terms = [f"{name} {getattr(self, name):g}" for name in ("proximal", "correction") if getattr(self, name)]
        shared = [self.allocation] if self.allocation != allocation.UNIFORM else []
        layers = ["every linear layer"] if self.every_linear else []
        return ", ".join([self.slice, *shared, *terms, *layers])

    @property
    def plain(self) -> Way:
        """The defaults in the same layers: what this way is held against."""
        return Way(every_linear=self.every_linear)


@dataclass
class Device:
    """What one device remembers from round to round. Not frozen for that reason."""

    rank: int
    texts: Sequence[Labelled]
    ranks: Mapping[str, int] | None = None
    last: tuple[int, RoundState] | None = None


@dataclass(frozen=True)
class Round:
    """Held-out loss of a version in nats, its accuracy, and the numbers that were trained for it."""

    loss: float
    accuracy: float
    numbers: int


@dataclass
class Life:
    """One fleet's life by one way."""

    fleet: Fleet
    way: Way
    steps: int
    seed: int
    devices: dict[str, Device] = field(init=False)

    def __post_init__(self) -> None:
        self.devices = {name: Device(rank, texts) for name, (rank, texts) in self.fleet.devices.items()}

    def run(self, rounds: int, every: int) -> Iterator[Round]:
        """The rounds that are evaluated: each `every`-th one, and the last."""
        method = increment()
        state = fresh_state(self.fleet.shapes, GLOBAL_RANK, self.seed)
        for number in range(1, rounds + 1):
            sent = codec.decode(codec.encode(state.adapter, "int8"))
            asked = np.random.default_rng([self.seed, number]).permutation(sorted(self.devices))[:TAKING_PART]
            updates = [self._update(str(name), sent, number) for name in sorted(asked)]
            state = method.combine(state, updates).state
            if number == rounds or number % every == 0:
                numbers = sum(update.trained.parameters for update in updates)
                yield Round(*wire_fleet.evaluate(self.fleet, state.adapter), numbers)

    def _update(self, name: str, sent: Adapter, number: int) -> Update:
        device = self.devices[name]
        chosen = self._chosen(device, sent, number - 1)
        scaling = self.fleet.classifier.live.scaling
        with wire_fleet.attached(self.fleet, chosen.seen, chosen.rows) as found:
            beside = self._beside(device, chosen.seen, number)
            terms: list[Term] = [proximal(chosen.before, self.way.proximal, scaling)] if self.way.proximal else []
            terms += [push(drift.pushes(beside), self.way.correction, scaling)] if beside else []
            order, rate = self.seed * 1000 + number, self.fleet.learning_rate
            moved, norms = wire_fleet.train(found, device.texts, self.steps, order, rate, terms)
            if self.way.correction:
                known = drift.record(live.read_all(found.live), chosen.before, chosen.rows)
                device.last = number, _state(live.trainable_parameters(found.live), rate, norms, {**beside, **known})
        trained = Adapter({layer: changed(chosen.before[layer], pair) for layer, pair in moved.items()})
        return Update(name, float(min(len(device.texts), self.steps * BATCH)), chosen.before, trained)

    def _chosen(self, device: Device, sent: Adapter, version: int) -> Slices:
        most = device.rank
        slot = Slot({name: LayerSlot(*pair.shape, pair.rank, min(most, pair.rank)) for name, pair in sent.items()})
        ranks: Mapping[str, int] = slot.trained
        if self.way.allocation == allocation.SPECTRUM:
            spectra = {name: allocation.singular_values(pair) for name, pair in sent.items()}
            ranks = device.ranks = allocation.ranks(slot, spectra, device.ranks)
        scores = self._scores(device, sent, ranks) if self.way.slice in slices.SCORED else None
        return slices.lay_out(sent, slices.choose(self.way.slice, sent, ranks, version, scores), version)

    def _scores(self, device: Device, sent: Adapter, ranks: Mapping[str, int]) -> dict[str, Scores]:
        rows = {name: range(rank) for name, rank in ranks.items()}
        lengths = [len(text.input_ids) for text in device.texts]
        with wire_fleet.attached(self.fleet, sent, rows) as found, watching(found.live) as scores:
            for batch in range(BATCHES):
                texts = [device.texts[i] for i in classify.batch_of(batch, lengths, BATCH, self.seed)]
                torch.autograd.backward(classify.classification_loss(found, classify.collate(found, texts)))
            return sized(scores)

    def _beside(self, device: Device, seen: Adapter, number: int) -> dict[str, np.ndarray]:
        if not self.way.correction or device.last is None:
            return {}
        before, last = device.last
        scaling = self.fleet.classifier.live.scaling
        return drift.drift_of(last, number - before, seen, scaling, self.way.correction)


def _state(
    parameters: Mapping[str, torch.nn.Parameter], rate: float, norms: Sequence[float], beside: Mapping[str, np.ndarray]
) -> RoundState:
    """The end of a round, as far as the next one's correction reads it."""
    reports = tuple(StepReport(step, len(norms), 0.0, 1, rate, norm, norm) for step, norm in enumerate(norms, start=1))
    values = {name: parameter.detach().numpy().copy() for name, parameter in parameters.items()}
    return RoundState(reports, values, {}, len(norms), beside=beside)
