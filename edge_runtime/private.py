"""What a device keeps for itself: a factor that its fleet does not share, from round to round.

It is kept with the update of the same round, both or neither, so that a round that is taken up again after a kill
begins with what it began with before. Another life of the fleet begins without.
"""

from __future__ import annotations

from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import changed
from edge_runtime.lora.factors import Private, exchanged, only
from edge_runtime.lora.slices import Slices
from edge_runtime.state import DeviceState
from edge_runtime.wire import codec


def known(received: Adapter, factor: Private, disk: DeviceState) -> Adapter:
    """What was received, with this device's own factor in the place of the fleet's.

    Args:
        received: the global adapter, as far as this device holds it.
        factor: that is private, "a" or "b"; "" for none.
        disk: remembers it. Where it does not, because nothing was trained yet or at another rank, the fleet's stays.
    """
    kept = disk.kept if factor else None
    return exchanged(received, codec.decode(kept), factor) if kept is not None else received


def after(received: Adapter, slices: Slices, change: Adapter, factor: Private) -> bytes | None:
    """What is to be kept after a round, as bytes; None where nothing is private.

    Args:
        received: what the round began with, the device's own factor in it.
        slices: what of it was trained.
        change: factor-wise, of the trained slice.
        factor: as of `known`.
    """
    if not factor:
        return None
    found = dict(received)
    for name, by in change.items():
        pair, rows = found[name], list(slices.rows[name])
        a, b = pair.a.copy(), pair.b.copy()
        moved = changed(slices.before[name], by)
        a[rows], b[:, rows] = moved.a, moved.b
        found[name] = Pair(a, b)
    return codec.encode(only(Adapter(found), factor), "fp32", factor=factor)
