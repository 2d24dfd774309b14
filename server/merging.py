"""The merge of a round, from the store to the store: updates are read layer by layer, and so is what becomes of them.

Each update is decoded once, into a scratch file if all of them are too many for memory. What a method then sees are
updates and a state whose layers are made when it asks for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from edge_runtime.wire import codec
from server.aggregators.method import Aggregator, Merged, Update, load_state, save_state
from server.downlink import Downlink
from server.scratch import Scratch
from server.slices import update_of
from server.store import Store, StoredVersion


def merge_round(
    store: Store, method: Aggregator, downlink: Downlink, base: StoredVersion, number: int, most: int
) -> tuple[Merged, StoredVersion, list[bytes]]:
    """The merge of the updates of a round; nothing of it is stored yet.

    Args:
        store: has the updates; its folder has the room that a merge may need.
        method: the fleet's.
        downlink: knows what devices decoded, and cuts the new version.
        base: the version that is merged into.
        number: of the round.
        most: bytes that an update may decode to.

    Returns:
        The outcome, the next version and the payloads of its bands.

    Raises:
        AggregationError: the updates do not fit together.
        CorruptPayloadError: an update is of no version that is still here.
        DiskFullError: no room for the scratch file.
    """
    room = Scratch(store.path.parent)
    state = replace(load_state(base.state), keep=room.put)
    merged = method.combine(state, _updates(store, downlink, number, room, most))
    return merged, *downlink.cut(base.version + 1, save_state(merged.state), merged.state.adapter)


def _updates(store: Store, downlink: Downlink, number: int, room: Scratch, most: int) -> Iterator[Update]:
    for offer, payload in store.updates(number):
        yield update_of(offer, room.put(codec.decode(payload, limit=most)), downlink.received(offer.version))


def told(merged: Merged) -> Mapping[str, Any]:
    """What is recorded of a merge: its errors, and of each layer what was done and what that cost."""
    layers = merged.layers
    return {
        "truncation": merged.truncation,
        "lost": sum(layer.lost**2 for layer in layers.values()) ** 0.5,
        "bound": sum(layer.bound**2 for layer in layers.values()) ** 0.5,
        "norm": sum(layer.norm**2 for layer in layers.values()) ** 0.5,
        "layers": {name: vars(layer) for name, layer in layers.items()},
    }
