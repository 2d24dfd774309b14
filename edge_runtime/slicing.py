"""What this device trains in a round: how many directions of which layer, and which of those that it holds.

The policies and the allocation are pure (`lora.slices`, `lora.allocation`). Here stands what they need of the device:
the ranks of the round before, and a choice that was made by looking at data, so that a round that is taken up again
after a restart trains the same slice without looking twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edge_runtime.errors import ConfigError, unknown_name
from edge_runtime.lora import allocation, pruning, slices
from edge_runtime.lora.adapter import Adapter, Slot
from edge_runtime.lora.algebra import changed
from edge_runtime.lora.slices import Scores, Slices
from edge_runtime.state import Memory
from edge_runtime.trainer import Introduction
from edge_runtime.wire.messages import Directive

RANKS, CHOSEN, PRUNED = "ranks", "slice", "pruned"
"""Facts of a device: the ranks that were allocated last, the slice that was chosen by scores, and the ranks that were
pruned."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What a round trains.

    Attributes:
        slices: what the model holds, and what of it is trained.
        plain: whether that is what the slot says by itself: the first directions, as many as planned.
    """

    slices: Slices
    plain: bool


def choose(
    directive: Directive,
    plan: Introduction,
    received: Adapter,
    disk: Memory,
    scores: Callable[[], Mapping[str, Scores]],
) -> Choice:
    """The slice that a directive asks this device to train.

    Args:
        directive: names policy, allocation and version.
        plan: what this device can bear.
        received: that version, as far as the device holds it.
        disk: remembers ranks and choices.
        scores: asked only where the policy needs them.

    Raises:
        ConfigError: a policy or an allocation that this version does not know.
    """
    slot = Slot({name: layer for name, layer in plan.slot.layers.items() if name in received})
    ranks = _ranks(directive.adapter.allocation, slot, received, disk, plan.least)
    left = disk.fact(PRUNED) if directive.training.kept < 1 else None
    if left:
        ranks = {layer: min(rank, left.get(layer, rank)) for layer, rank in ranks.items()}
        received = pruning.narrowed(received, ranks)
    if directive.adapter.own:
        ranks = {layer: rank + min(directive.adapter.own, *received[layer].shape) for layer, rank in ranks.items()}
    name, version = directive.adapter.slice, directive.version
    if name in slices.SCORED:
        directions = _by_scores(name, directive, ranks, received, disk, scores)
    else:
        directions = slices.choose(name, received, ranks, version)
    plain = directions == {layer: tuple(range(count)) for layer, count in slot.trained.items()}
    return Choice(slices.lay_out(received, directions, version), plain)


def pruned(directive: Directive, before: Adapter, change: Adapter) -> dict[str, dict[str, int]]:
    """The facts to be kept with an update: the ranks to go on with, where the fleet has devices prune theirs.

    Args:
        directive: of the round.
        before: the slice that was trained, before it was.
        change: of it.
    """
    if directive.training.kept == 1:
        return {}
    after = Adapter({name: changed(before[name], by) for name, by in change.items()})
    return {PRUNED: pruning.pruned(before, after, directive.training.kept)}


def _ranks(name: str, slot: Slot, received: Adapter, disk: Memory, least: int) -> dict[str, int]:
    if name not in allocation.ALLOCATIONS:
        raise ConfigError(unknown_name("allocation", name, allocation.ALLOCATIONS) + "; update this device")
    if name == allocation.UNIFORM:
        return slot.trained
    spectra = {layer: allocation.singular_values(received[layer]) for layer in slot.trained}
    before = disk.fact(RANKS)
    ranks = allocation.ranks(slot, spectra, before, least=least)
    if ranks != before:
        disk.put_fact(RANKS, ranks)
    return ranks


def _by_scores(
    name: str,
    directive: Directive,
    ranks: Mapping[str, int],
    received: Adapter,
    disk: Memory,
    scores: Callable[[], Mapping[str, Scores]],
) -> dict[str, tuple[int, ...]]:
    held = json.dumps([name, directive.run, directive.version, dict(ranks), received.ranks], sort_keys=True)
    about = hashlib.sha256(held.encode()).hexdigest()
    known = disk.fact(CHOSEN)
    if known is not None and known["about"] == about:
        return {layer: tuple(numbers) for layer, numbers in known["directions"].items()}
    directions = slices.choose(name, received, ranks, directive.version, scores())
    disk.put_fact(CHOSEN, {"about": about, "directions": directions})
    return directions
