"""What an update says of the version that it was trained from: the slice as it was, and as the device left it. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from edge_runtime.errors import CorruptPayloadError
from edge_runtime.lora.adapter import Adapter, Deferred, Pair
from edge_runtime.lora.algebra import changed, cut, zero
from edge_runtime.lora.slices import slice_of
from edge_runtime.wire.messages import Offer
from server.aggregators.method import Update

Directions = Mapping[str, tuple[int, ...]]
"""Layer → numbers of the directions that a change is of (see `edge_runtime.lora.slices`)."""


def update_of(offer: Offer, change: Adapter, sent: Adapter, directions: Directions | None = None) -> Update:
    """What the method merges.

    The slice is read from the update and not from the device's hello, nor from the directive: whoever restarts may say
    hello with another plan while the update of its former one is on its way, and a fleet may change its policy. An
    increment is the change of no slice: what it changed is a pair of zeros.

    Args:
        offer: the update's.
        change: its payload, decoded.
        sent: the version that the offer names, as devices decoded it.
        directions: of the change; the first ones where a layer is not named.

    Raises:
        CorruptPayloadError: the change is of no slice of that version, or weights are not those of its layers.
    """
    known, sizes, named = sent.sizes, change.sizes, directions or {}
    for name, (d_out, d_in, rank) in sizes.items():
        there = known.get(name)
        most = 0 if there is None else there[2] if offer.kind == "slice" else min(there[:2])
        if there is None or (d_out, d_in) != there[:2] or not 0 < rank <= most:
            expected = f"{there[:2]} at rank 1 to {most}" if there else "no such layer"
            raise CorruptPayloadError(
                f"layer '{name}' of '{offer.client}': expected {expected}, found {(d_out, d_in)} at rank {rank}; "
                "train from the version that the directive names"
            )
        if name in named:
            try:
                slice_of(name, sent[name], named[name], offer.version)
            except ValueError as error:
                raise CorruptPayloadError(f"layer '{name}' of '{offer.client}': {error}") from error

    def before(name: str) -> Pair:
        if offer.kind == "increment":
            return zero(sizes[name][:2], sizes[name][2])
        if name in named:
            return slice_of(name, sent[name], named[name], offer.version)
        return cut(sent[name], sizes[name][2])

    # Made layer by layer: of a large update, or of many, the factors are in memory only while a layer is merged.
    received = Adapter(Deferred(sizes, before))
    if offer.kind == "increment":
        return Update(offer.client, float(offer.examples), received, change, _weights(offer, change))
    trained = Adapter(Deferred(sizes, lambda name: changed(before(name), change[name])))
    return Update(offer.client, float(offer.examples), received, trained, _weights(offer, change))


def _weights(offer: Offer, change: Adapter) -> dict[str, float]:
    for name, examples in offer.weights:
        if name not in change or examples > offer.examples:
            raise CorruptPayloadError(
                f"layer '{name}' of '{offer.client}' claims {examples} examples; expected a layer of the update, "
                f"and at most the {offer.examples} of the whole"
            )
    return {name: float(examples) for name, examples in offer.weights}
