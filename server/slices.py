"""What an update says of the version that it was trained from: the slice as it was, and as the device left it. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from edge_runtime.errors import CorruptPayloadError
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import changed, zero
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
    received: dict[str, Pair] = {}
    for name, pair in change.items():
        known = sent.layers.get(name)
        most = 0 if known is None else known.rank if offer.kind == "slice" else min(known.shape)
        if known is None or pair.shape != known.shape or not 0 < pair.rank <= most:
            expected = f"{known.shape} at rank 1 to {most}" if known else "no such layer"
            raise CorruptPayloadError(
                f"layer '{name}' of '{offer.client}': expected {expected}, found {pair.shape} at rank {pair.rank}; "
                "train from the version that the directive names"
            )
        if offer.kind == "increment":
            received[name] = zero(pair.shape, pair.rank)
            continue
        try:
            numbers = (directions or {}).get(name, tuple(range(pair.rank)))
            received[name] = slice_of(name, known, numbers, offer.version)
        except ValueError as error:
            raise CorruptPayloadError(f"layer '{name}' of '{offer.client}': {error}") from error
    before = Adapter(received)
    whole = offer.kind == "increment"
    trained = change if whole else Adapter({name: changed(before[name], pair) for name, pair in change.items()})
    return Update(offer.client, float(offer.examples), before, trained, _weights(offer, change))


def _weights(offer: Offer, change: Adapter) -> dict[str, float]:
    for name, examples in offer.weights:
        if name not in change or examples > offer.examples:
            raise CorruptPayloadError(
                f"layer '{name}' of '{offer.client}' claims {examples} examples; expected a layer of the update, "
                f"and at most the {offer.examples} of the whole"
            )
    return {name: float(examples) for name, examples in offer.weights}
