"""What an update says of the version that it was trained from: the slice as it was, and as the device left it. Pure."""

from __future__ import annotations

from edge_runtime.errors import CorruptPayloadError
from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.algebra import changed, take, zero
from edge_runtime.wire.messages import Offer
from server.aggregators.method import Update


def update_of(offer: Offer, change: Adapter, sent: Adapter) -> Update:
    """What the method merges.

    The slice is read from the update and not from the device's hello: whoever restarts may say hello with another plan
    while the update of its former one is on its way, or waits for the merge. An increment is the change of no slice:
    what it changed is a pair of zeros.

    Args:
        offer: the update's.
        change: its payload, decoded.
        sent: the version that the offer names, as devices decoded it.

    Raises:
        CorruptPayloadError: the change is of no slice of that version, or weights are not those of its layers.
    """
    for name, pair in change.items():
        known = sent.layers.get(name)
        most = 0 if known is None else known.rank if offer.kind == "slice" else min(known.shape)
        if known is None or pair.shape != known.shape or not 0 < pair.rank <= most:
            expected = f"{known.shape} at rank 1 to {most}" if known else "no such layer"
            raise CorruptPayloadError(
                f"layer '{name}' of '{offer.client}': expected {expected}, found {pair.shape} at rank {pair.rank}; "
                "train from the version that the directive names"
            )
    weights = _weights(offer, change)
    if offer.kind == "increment":
        nothing = Adapter({name: zero(pair.shape, pair.rank) for name, pair in change.items()})
        return Update(offer.client, float(offer.examples), nothing, change, weights)
    received = Adapter({name: take(sent[name], range(pair.rank)) for name, pair in change.items()})
    trained = Adapter({name: changed(received[name], pair) for name, pair in change.items()})
    return Update(offer.client, float(offer.examples), received, trained, weights)


def _weights(offer: Offer, change: Adapter) -> dict[str, float]:
    for name, examples in offer.weights:
        if name not in change or examples > offer.examples:
            raise CorruptPayloadError(
                f"layer '{name}' of '{offer.client}' claims {examples} examples; expected a layer of the update, "
                f"and at most the {offer.examples} of the whole"
            )
    return {name: float(examples) for name, examples in offer.weights}
