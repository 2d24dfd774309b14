"""What an update says: of any slice, exactly as the device had it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import CorruptPayloadError
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import change, cut, decompose, take, to_pair
from edge_runtime.lora.slices import FRESH, POLICIES, choose, lay_out
from edge_runtime.wire import blobs, codec
from edge_runtime.wire.messages import Offer
from server.aggregators.increment import increment
from server.aggregators.method import State
from server.slices import update_of
from tests.strategies import gaussian, laws

LAYER, SHAPE, RANK = "model.layers.0.q_proj", (20, 30), 8


def version_of(seed: int) -> Adapter:
    return Adapter({LAYER: to_pair(decompose([(1.0, gaussian(SHAPE, RANK, seed))]), 0, RANK)})


def offer_of(payload: bytes, version: int = 3) -> Offer:
    return Offer(
        client="a", round=4, version=version, blob=blobs.describe(payload, 1024), examples=7, loss_first=2.0,
        loss_last=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(POLICIES))
@laws
@given(st.integers(0, 1 << 20), st.integers(1, 4), st.integers(4, RANK))
def test_the_global_adapter_moves_by_exactly_what_a_device_changed(
    name: str, seed: int, trained: int, held: int
) -> None:
    """Whatever it trains, and however little it holds: the merge is the sum of the version and the device's change."""
    sent = version_of(seed)
    received = Adapter({LAYER: cut(sent[LAYER], held)})
    scores = {LAYER: np.abs(np.random.default_rng(seed).standard_normal(held))}
    found = lay_out(received, choose(name, received, {LAYER: trained}, 3, scores), 3)
    before = found.before[LAYER]
    moved = gaussian(SHAPE, trained, seed + 1)
    after = Pair(before.a + moved.a, before.b + moved.b)
    payload = codec.encode(Adapter({LAYER: change(after, before)}), "fp32", found.directions)
    decoded, directions = codec.decode_slice(payload)
    update = update_of(offer_of(payload), decoded, sent, directions)
    merged = increment().combine(State(sent, Adapter({}), 3), [update]).state

    total = merged.adapter[LAYER].product() + (merged.tail[LAYER].product() if LAYER in merged.tail else 0)
    expected = sent[LAYER].product() + after.product() - before.product()
    np.testing.assert_allclose(total, expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [((0, RANK), "must lie in"), ((FRESH + 1, FRESH + 2), "appended"), ((5, FRESH + 3), "appended")],
)
def test_a_change_of_no_slice_is_refused(numbers: tuple[int, ...], problem: str) -> None:
    payload = codec.encode(Adapter({LAYER: gaussian(SHAPE, 2, 0)}), "fp32", {LAYER: numbers})
    decoded, directions = codec.decode_slice(payload)

    with pytest.raises(CorruptPayloadError, match=problem):
        update_of(offer_of(payload), decoded, version_of(0), directions)


def test_without_numbers_a_change_is_of_the_first_directions() -> None:
    sent = version_of(0)
    moved = Adapter({LAYER: gaussian(SHAPE, 2, 0)})
    update = update_of(offer_of(b"x"), moved, sent)

    assert np.array_equal(update.received[LAYER].a, take(sent[LAYER], range(2)).a)
    assert (update.client, update.weight) == ("a", 7.0)
