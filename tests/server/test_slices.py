"""What an update says: of any slice, exactly as the device had it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import CorruptPayloadError
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import change, cut, decompose, refill, take, to_pair
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


def refilled(seed: int, learnt: int) -> Adapter:
    """A version that has learnt so many directions; the others are refilled, as the server refills them."""
    found = to_pair(decompose([(1.0, gaussian(SHAPE, RANK, seed))]), 0, learnt)
    return Adapter({LAYER: refill(found, RANK, f"{seed}")})


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


@pytest.mark.parametrize("name", sorted(POLICIES))
@laws
@given(
    st.integers(0, 1 << 20),
    st.lists(
        st.integers(1, RANK).flatmap(lambda held: st.tuples(st.just(held), st.integers(1, held))),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, RANK),
    st.sampled_from(["fp32", "int8"]),
)
def test_an_idle_round_changes_nothing_by_any_policy(
    name: str, seed: int, devices: list[tuple[int, int]], learnt: int, downlink: str
) -> None:
    """Devices (held, trained) that choose, and learn nothing, of a version of which some directions may be empty."""
    state = State(refilled(seed, learnt), Adapter({}), 3)
    sent = codec.decode(codec.encode(state.adapter, downlink))
    updates = []
    for at, (held, trained) in enumerate(devices):
        received = Adapter({LAYER: cut(sent[LAYER], held)})
        scores = {LAYER: np.abs(np.random.default_rng(seed + at).standard_normal(held))}
        found = lay_out(received, choose(name, received, {LAYER: trained}, 3, scores), 3)
        nothing = Adapter({LAYER: change(found.before[LAYER], found.before[LAYER])})
        decoded, directions = codec.decode_slice(codec.encode(nothing, "fp32", found.directions))
        offer = offer_of(b"x").model_copy(update={"client": f"device-{at}"})
        updates.append(update_of(offer, decoded, sent, directions))
    merged = increment().combine(state, updates).state

    expected = state.adapter[LAYER].product()
    total = merged.adapter[LAYER].product() + (merged.tail[LAYER].product() if LAYER in merged.tail else 0)
    np.testing.assert_allclose(total, expected, atol=1e-5 * np.abs(expected).max(initial=0))
    assert merged.adapter[LAYER].rank == RANK


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
