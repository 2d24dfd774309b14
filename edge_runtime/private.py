"""What a device keeps for itself from round to round: a factor that its fleet does not share, or directions of its own.

It is kept with the update of the same round, both or neither, so that a round that is taken up again after a kill
begins with what it began with before. Another life of the fleet, or another base, begins without.

A factor is kept with the one that it was learnt beside, and turned with that one: a server that re-factorises hands out
the same shared factor in other rows, and a device that was away for some rounds comes back to one that has turned.

Directions of its own follow those of the fleet in each layer that the device trains. They begin as any do, with drawn
rows of `a` and b = 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_runtime.lora import rebasing
from edge_runtime.lora.adapter import Adapter, Pair, Slot
from edge_runtime.lora.algebra import cut, fresh_rows
from edge_runtime.lora.factors import exchanged
from edge_runtime.lora.slices import Slices, learnt
from edge_runtime.state import Memory
from edge_runtime.wire import codec
from edge_runtime.wire.messages import Directive

OF = "kept_of"
"""A fact of a device: the life of the fleet and the base that what it keeps belongs to."""


def belonging(directive: Directive, base: str) -> dict[str, dict[str, str]]:
    """The fact to be kept with what a round left, whatever that is.

    Args:
        directive: of the round.
        base: fingerprint of the device's base.
    """
    return {OF: {"run": directive.run, "base": base}} if directive.private or directive.adapter.own else {}


def known(received: Adapter, directive: Directive, slot: Slot, disk: Memory, base: str | None = None) -> Adapter:
    """What was received, with what this device keeps for itself in the place of the fleet's, or behind it.

    Args:
        received: the global adapter, as far as this device holds it.
        directive: says what is private.
        slot: what the device holds and trains of the fleet's.
        disk: remembers it. Where it does not, because nothing was trained yet or at another rank, the fleet's factor
            stays, and own directions begin.
        base: fingerprint of the device's base; None for that of what is kept.
    """
    kept = disk.kept
    if kept is not None and base is not None and disk.fact(OF) != belonging(directive, base).get(OF):
        kept = None
    mine = codec.decode(kept) if kept is not None else Adapter({})
    if directive.private:
        return exchanged(received, rebasing.turned(mine, received, directive.private), directive.private)
    if not directive.adapter.own:
        return received
    found = dict(received)
    for name in slot.trained.keys() & received.keys():
        fleet, count = received[name], min(directive.adapter.own, *received[name].shape)
        pair = mine[name] if name in mine and mine[name].rank == count else _begun(name, fleet, count)
        found[name] = rebasing.beside(fleet, pair)
    return Adapter(found)


def shared(
    change: Adapter, directions: Mapping[str, tuple[int, ...]], own: int
) -> tuple[Adapter, dict[str, tuple[int, ...]]]:
    """What of a change, and of the numbers of its directions, is the fleet's.

    Args:
        change: factor-wise, of the trained slice.
        directions: layer → numbers of its directions.
        own: directions of each layer that are the device's own, the last ones; fewer where it is narrower.
    """
    if not own:
        return change, dict(directions)
    left = {name: pair.rank - min(own, *pair.shape) for name, pair in change.items()}
    found = Adapter({name: cut(pair, left[name]) for name, pair in change.items()})
    return found, {name: numbers[: left[name]] for name, numbers in directions.items()}


def after(received: Adapter, slices: Slices, change: Adapter, directive: Directive) -> bytes | None:
    """What is to be kept after a round, as bytes; None where nothing is private.

    Args:
        received: what the round began with, as `known` gave it.
        slices: what of it was trained.
        change: factor-wise, of the trained slice.
        directive: as of `known`.
    """
    own = directive.adapter.own
    if not directive.private and not own:
        return None
    found = learnt(received, slices, change)
    if directive.private:
        return codec.encode(Adapter({name: found[name] for name in change}), "fp32")
    mine = {name: rebasing.last(found[name], min(own, *found[name].shape)) for name in change}
    return codec.encode(Adapter(mine), "fp32")


def _begun(name: str, fleet: Pair, count: int) -> Pair:
    d_out, d_in = fleet.shape
    return Pair(fresh_rows(np.zeros((0, d_in), np.float32), count, f"own:{name}"), np.zeros((d_out, count), np.float32))
