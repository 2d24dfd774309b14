"""Error feedback: what a codec lost of one update is added to the next.

    wanted = change + residual      sent = decode(encode(wanted))      residual' = wanted - sent

Over rounds, what was sent plus the residual equals the sum of the changes: nothing is lost, only late. Source:
Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes" (ICML 2019).

The residual is a factor-wise difference, so it belongs to the slice that it was measured in, and the next version is
factorised anew: its directions are others, or the same ones turned. So the slice is kept with the residual, and before
it is added the residual is turned as the slice was (orthogonal Procrustes, `lora.rotation`). Where the slice did not
change, nothing is turned and nothing lost. What is lost otherwise stands in docs/decisions/0008.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import change as difference
from edge_runtime.lora.algebra import changed
from edge_runtime.lora.dense import followed, is_dense
from edge_runtime.lora.rotation import align, follow, rotate_rows
from edge_runtime.wire import codec

Directions = Mapping[str, tuple[int, ...]]
"""Layer → numbers of directions, ascending; layers whose slice is their first directions need not be named."""


@dataclass(frozen=True, eq=False)
class Residual:
    """What a device still owes.

    Attributes:
        owed: factor-wise, what was wanted and did not arrive.
        slice: the slice that it was measured in; same layers, shapes and ranks.
        directions: layer → the numbers of its directions, where they were not the first ones.
    """

    owed: Adapter
    slice: Adapter
    directions: Directions = field(default_factory=dict)


NONE = Residual(Adapter({}), Adapter({}))
"""What a device owes that has not sent anything."""


def wanted(change: Adapter, received: Adapter, residual: Residual, directions: Directions | None = None) -> Adapter:
    """The change that should arrive: this round's, and what is owed, expressed in the slice received now.

    Args:
        change: factor-wise change of this round.
        received: the slice that was trained, before it was.
        residual: what is owed.
        directions: of the slice.
    """
    now = _elsewhere(received, directions or {})
    moved = now.keys() | residual.directions.keys()
    return Adapter({name: _with(pair, received[name], name, residual, name in moved) for name, pair in change.items()})


def left(wanted: Adapter, sent: Adapter, received: Adapter, directions: Directions | None = None) -> Residual:
    """What is owed after `sent` arrived in the place of `wanted`; the arguments are those of `wanted`."""
    owed = Adapter({name: difference(wanted[name], sent[name]) for name in wanted})
    return Residual(owed, received, _elsewhere(received, directions or {}))


def _elsewhere(slice_: Adapter, directions: Directions) -> dict[str, tuple[int, ...]]:
    """The layers whose slice is not their first directions."""
    return {name: found for name, found in directions.items() if found != tuple(range(slice_[name].rank))}


def dump(residual: Residual) -> bytes:
    """A residual as bytes: two blobs in fp32, the length of the first before both; the second names the directions."""
    owed, held = codec.encode(residual.owed, "fp32"), codec.encode(residual.slice, "fp32", residual.directions)
    return len(owed).to_bytes(8, "little") + owed + held


def load(payload: bytes | None) -> Residual:
    """The residual in bytes that `dump` wrote, bit for bit; nothing is owed where there are none.

    Raises:
        CorruptPayloadError: bytes that are no residual.
    """
    if payload is None:
        return NONE
    stop = 8 + int.from_bytes(payload[:8], "little")
    held, directions = codec.decode_slice(payload[stop:])
    return Residual(codec.decode(payload[8:stop]), held, _elsewhere(held, directions))


def _with(change: Pair, received: Pair, name: str, residual: Residual, moved: bool) -> Pair:
    owed, old = residual.owed.layers.get(name), residual.slice.layers.get(name)
    if owed is None or old is None or owed.shape != change.shape or old.rank != owed.rank:
        return change
    if is_dense(name):
        # Rows keep their numbers from version to version; nothing turns them.
        return changed(change, Pair(rotate_rows(followed(received, old), owed.a), np.zeros_like(change.b)))
    return changed(change, _turned(owed, old, received, moved or old.rank != received.rank))


def _turned(owed: Pair, old: Pair, new: Pair, moved: bool) -> Pair:
    if np.array_equal(old.a, new.a) and np.array_equal(old.b, new.b):
        return owed
    rotation = follow(new, old) if moved else align(new, old).rotation
    return Pair(rotate_rows(rotation, owed.a), np.ascontiguousarray(rotate_rows(rotation, owed.b.T).T))
