"""A global adapter enters the live model: as many directions of each layer are trained as the round asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from edge_runtime.lora.adapter import Adapter, Pair, Slot
from edge_runtime.lora.algebra import take
from edge_runtime.train.families import Family
from edge_runtime.train.live import LiveModel


@dataclass(frozen=True, eq=False)
class Received:
    """What a round begins from.

    Attributes:
        before: layer → the slice as it was before training.
        rows: layer → which rows of what the model holds it is.
        digest: of all that the model holds.
    """

    before: Mapping[str, Pair]
    rows: Mapping[str, tuple[int, ...]]
    digest: str


def slot_for(slot: Slot, rows: Mapping[str, Sequence[int]] | None, ranks: Mapping[str, int]) -> Slot:
    """The plan's slot with as many directions trained as rows are named, where rows are named at all.

    A layer of which rows are named may come wider than it was planned: with directions of the device's own.

    Args:
        slot: of the plan.
        rows: layer → which of its rows are trained.
        ranks: layer → of the adapter that comes.
    """
    if rows is None:
        return slot
    layers = {}
    for name, layer in slot.layers.items():
        held = max(layer.held, ranks.get(name, 0)) if name in rows else layer.held
        layers[name] = replace(layer, held=held, trained=len(rows.get(name, ())))
    return Slot(layers)


def fitted(live: LiveModel, family: Family, slot: Slot) -> LiveModel:
    """A live model of that slot: the same, or another adapter in the same base, where the ranks are others.

    An adapter costs next to nothing to make beside the base, which stays where it is.
    """
    if live.slot == slot:
        return live
    return family.attach(family.detach(live), slot, scaling=live.scaling)


def receive(
    live: LiveModel, family: Family, adapter: Adapter, rows: Mapping[str, Sequence[int]] | None = None
) -> Received:
    """Load an adapter, and keep what the round will be compared with.

    Of all that was received, the slice alone is needed again: the rest lives in the model.

    Raises:
        RoundError: it does not fit the live model's slot.
    """
    family.load(live, adapter, rows)
    before = {name: take(adapter[name], found) for name, found in live.directions.items()}
    return Received(before, dict(live.directions), adapter.digest())
