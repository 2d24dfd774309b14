"""What an update says of the version that it was trained from: the slice as it was, and as the device left it. Pure."""

from __future__ import annotations

from edge_runtime.errors import CorruptPayloadError
from edge_runtime.lora.adapter import Adapter, Deferred
from edge_runtime.lora.algebra import changed, cut
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
    known, sizes = sent.sizes, change.sizes
    for name, (d_out, d_in, rank) in sizes.items():
        most = known.get(name)
        if most is None or (d_out, d_in) != most[:2] or not 0 < rank <= most[2]:
            expected = f"{most[:2]} at rank 1 to {most[2]}" if most else "no such layer"
            raise CorruptPayloadError(
                f"layer '{name}' of '{offer.client}': expected {expected}, found {(d_out, d_in)} at rank {rank}; "
                "train from the version that the directive names"
            )
    # Made layer by layer: of a large update, or of many, the factors are in memory only while a layer is merged.
    received = Adapter(Deferred(sizes, lambda name: cut(sent[name], sizes[name][2])))
    trained = Adapter(Deferred(sizes, lambda name: changed(received[name], change[name])))
    return Update(offer.client, float(offer.examples), received, trained)
