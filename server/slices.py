"""What an update says of the version that it was trained from: the slice as it was, and as the device left it. Pure."""

from __future__ import annotations

from edge_runtime.errors import CorruptPayloadError
from edge_runtime.lora.adapter import Adapter
from edge_runtime.lora.algebra import changed, take
from edge_runtime.wire.messages import Offer
from server.aggregators.method import Update


def update_of(offer: Offer, change: Adapter, sent: Adapter) -> Update:
    """What the method merges.

    The slice is read from the update and not from the device's hello: whoever restarts may say hello with another plan
    while the update of its former one is on its way, or waits for the merge.

    Args:
        offer: the update's.
        change: its payload, decoded.
        sent: the version that the offer names, as devices decoded it.

    Raises:
        CorruptPayloadError: the change is of no slice of that version.
    """
    for name, pair in change.items():
        known = sent.layers.get(name)
        if known is None or pair.shape != known.shape or not 0 < pair.rank <= known.rank:
            expected = f"{known.shape} at rank 1 to {known.rank}" if known else "no such layer"
            raise CorruptPayloadError(
                f"layer '{name}' of '{offer.client}': expected {expected}, found {pair.shape} at rank {pair.rank}; "
                "train from the version that the directive names"
            )
    received = Adapter({name: take(sent[name], range(pair.rank)) for name, pair in change.items()})
    trained = Adapter({name: changed(received[name], pair) for name, pair in change.items()})
    return Update(offer.client, float(offer.examples), received, trained)
