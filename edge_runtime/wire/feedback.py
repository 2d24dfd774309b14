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

from dataclasses import dataclass

import numpy as np

from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import change as difference
from edge_runtime.lora.algebra import changed
from edge_runtime.lora.rotation import align, rotate_rows
from edge_runtime.wire import codec


@dataclass(frozen=True, eq=False)
class Residual:
    """What a device still owes.

    Attributes:
        owed: factor-wise, what was wanted and did not arrive.
        slice: the slice that it was measured in; same layers, shapes and ranks.
    """

    owed: Adapter
    slice: Adapter


NONE = Residual(Adapter({}), Adapter({}))
"""What a device owes that has not sent anything."""


def wanted(change: Adapter, received: Adapter, residual: Residual) -> Adapter:
    """The change that should arrive: this round's, and what is owed, expressed in the slice received now.

    A layer whose rank is another one than before owes nothing: there is no rotation between the two.
    """
    return Adapter({name: _with(pair, received[name], name, residual) for name, pair in change.items()})


def left(wanted: Adapter, sent: Adapter, received: Adapter) -> Residual:
    """What is owed after `sent` arrived in the place of `wanted`."""
    return Residual(Adapter({name: difference(wanted[name], sent[name]) for name in wanted}), received)


def dump(residual: Residual) -> bytes:
    """A residual as bytes: two blobs in fp32, the length of the first before both."""
    owed, held = (codec.encode(adapter, "fp32") for adapter in (residual.owed, residual.slice))
    return len(owed).to_bytes(8, "little") + owed + held


def load(payload: bytes | None) -> Residual:
    """The residual in bytes that `dump` wrote, bit for bit; nothing is owed where there are none.

    Raises:
        CorruptPayloadError: bytes that are no residual.
    """
    if payload is None:
        return NONE
    stop = 8 + int.from_bytes(payload[:8], "little")
    return Residual(codec.decode(payload[8:stop]), codec.decode(payload[stop:]))


def _with(change: Pair, received: Pair, name: str, residual: Residual) -> Pair:
    owed, old = residual.owed.layers.get(name), residual.slice.layers.get(name)
    if owed is None or old is None or owed.shape != change.shape or owed.rank != change.rank:
        return change
    return changed(change, _turned(owed, old, received))


def _turned(owed: Pair, old: Pair, new: Pair) -> Pair:
    if np.array_equal(old.a, new.a) and np.array_equal(old.b, new.b):
        return owed
    rotation = align(new, old).rotation
    return Pair(rotate_rows(rotation, owed.a), np.ascontiguousarray(rotate_rows(rotation, owed.b.T).T))
