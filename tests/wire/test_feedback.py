"""Error feedback: over rounds nothing is lost, and what is owed follows the slice when that is turned."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_runtime.errors import CorruptPayloadError
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import change as difference
from edge_runtime.lora.algebra import changed
from edge_runtime.wire import feedback, update
from edge_runtime.wire.codec import CODECS, decode
from edge_runtime.wire.update import Terms
from tests.strategies import gaussian, laws
from tests.wire.blobcraft import same

LAYERS = {"model.layers.0.q_proj": (24, 40), "model.layers.1.q_proj": (40, 24)}
every_way = pytest.mark.parametrize("name", ["auto", *sorted(CODECS)])


def drawn(seed: int, rank: int = 3, size: float = 1.0) -> Adapter:
    found = {name: gaussian(shape, rank, seed + index) for index, (name, shape) in enumerate(LAYERS.items())}
    return Adapter({name: Pair(pair.a * np.float32(size), pair.b * np.float32(size)) for name, pair in found.items()})


def total(parts: list[Adapter]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {
        name: (
            np.sum([part[name].a.astype(np.float64) for part in parts], axis=0),
            np.sum([part[name].b.astype(np.float64) for part in parts], axis=0),
        )
        for name in LAYERS
    }


@every_way
@laws
@given(st.integers(0, 1 << 20), st.integers(1, 6))
def test_what_arrived_and_what_is_owed_are_what_was_learnt(name: str, seed: int, rounds: int) -> None:
    """In a slice that does not change: the sum of what was decoded plus the residual is the sum of the changes."""
    received, owed, arrived, learnt = drawn(7), feedback.NONE, [], []
    for number in range(rounds):
        learnt.append(drawn(seed + 10 * number, size=0.1))
        made = update.make(learnt[-1], received, owed, Terms(name, upload_bytes=400))
        assert same(made.sent, decode(made.payload)), "what the server adds is what the blob decodes to"
        owed = made.residual
        arrived.append(made.sent)
    for layer, sums in total([*arrived, owed.owed]).items():
        for found, expected in zip(sums, total(learnt)[layer], strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)


@laws
@given(st.integers(0, 1 << 20))
def test_what_is_owed_keeps_its_meaning_when_the_slice_is_turned(seed: int) -> None:
    """The same product, factorised as (R a, b Rᵀ): paid in the new slice, the debt changes the product as before."""
    old, debt = drawn(seed), drawn(seed + 50, size=0.01)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
    turned = Adapter(
        {
            name: Pair((rotation @ pair.a).astype(np.float32), (pair.b @ rotation.T).astype(np.float32))
            for name, pair in old.items()
        }
    )
    nothing = drawn(0, size=0.0)
    paid = feedback.wanted(nothing, turned, feedback.Residual(debt, old))
    for name, pair in paid.items():
        expected = changed(old[name], debt[name]).product() - old[name].product()
        found = changed(turned[name], pair).product() - turned[name].product()
        np.testing.assert_allclose(found, expected, atol=2e-4)


def test_in_the_same_slice_nothing_is_turned_not_even_by_rounding() -> None:
    slice_, debt = drawn(1), drawn(2)
    copy = Adapter({name: Pair(pair.a.copy(), pair.b.copy()) for name, pair in slice_.items()})

    assert same(feedback.wanted(drawn(0, size=0.0), copy, feedback.Residual(debt, slice_)), debt)


def test_a_layer_of_another_rank_owes_nothing_and_the_others_still_do() -> None:
    first, second = LAYERS
    small = Adapter({first: drawn(3, rank=2)[first], second: drawn(3)[second]})
    fresh = Adapter({first: drawn(4, rank=2)[first], second: drawn(4)[second]})
    paid = feedback.wanted(fresh, small, feedback.Residual(drawn(2), drawn(3)))

    assert same(Adapter({first: paid[first]}), Adapter({first: fresh[first]}))
    assert not np.array_equal(paid[second].b, fresh[second].b)


def test_a_layer_that_is_trained_for_the_first_time_owes_nothing() -> None:
    change = drawn(4)

    assert same(feedback.wanted(change, drawn(3), feedback.NONE), change)


def test_without_feedback_nothing_is_owed_and_nothing_is_paid() -> None:
    change = drawn(4, size=0.1)
    made = update.make(change, drawn(3), feedback.Residual(drawn(2), drawn(3)), Terms("int2", error_feedback=False))

    assert made.residual is feedback.NONE
    assert same(made.sent, update.make(change, drawn(3), feedback.NONE, Terms("int2")).sent)


@laws
@given(st.integers(0, 1 << 20))
def test_a_residual_comes_back_from_disk_bit_for_bit(seed: int) -> None:
    kept = feedback.Residual(drawn(seed), drawn(seed + 1))
    back = feedback.load(feedback.dump(kept))

    assert (back.owed.digest(), back.slice.digest()) == (kept.owed.digest(), kept.slice.digest())


def test_no_residual_on_disk_is_nothing_owed() -> None:
    assert feedback.load(None) is feedback.NONE
    assert feedback.load(feedback.dump(feedback.NONE)).owed.ranks == {}


@laws
@given(st.binary(max_size=60))
@example(b"")
def test_bytes_that_are_no_residual_are_refused(payload: bytes) -> None:
    with pytest.raises(CorruptPayloadError):
        feedback.load(payload)


def test_the_change_is_measured_in_the_first_directions_of_what_is_held() -> None:
    held, change = drawn(5, rank=8), drawn(6, size=0.1)
    made = update.make(change, held, feedback.NONE, Terms("int4"))

    assert made.residual.slice.ranks == change.ranks
    assert all(np.array_equal(made.residual.slice[name].a, held[name].a[:3]) for name in LAYERS)
    lost = {name: difference(change[name], made.sent[name]) for name in LAYERS}
    assert same(made.residual.owed, Adapter(lost))
