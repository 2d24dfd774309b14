"""Dense tensors are merged by the rows that a device owns, under every method, against a naive reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.lora.adapter import Adapter, LayerSlot, Pair, Slot
from edge_runtime.lora.algebra import decompose, take, to_pair
from edge_runtime.lora.dense import as_pair, dense_name
from edge_runtime.wire.messages import group
from server import aggregators
from server.aggregators import METHODS
from server.aggregators.increment import increment
from server.aggregators.method import State, Update, fresh_state, load_state, prefix, save_state
from server.fleet import unbearable
from tests.runtime.said import hello

ROWS, WIDTH = 7, 5
PROMPT = dense_name("model.embed_tokens", "prompt")
BIAS = dense_name("model.layers.0.self_attn.q_proj", "bias")
PAIR = "model.layers.0.self_attn.q_proj"
SHAPES = {PROMPT: (ROWS, WIDTH), BIAS: (1, WIDTH)}

each_method = pytest.mark.parametrize("name", sorted(METHODS))


def learnt(seed: int = 0) -> State:
    draw = np.random.default_rng(seed)
    return State(
        Adapter(
            {
                name: as_pair(draw.standard_normal((rows, width)).astype(np.float32), range(rows), rows)
                for name, (rows, width) in SHAPES.items()
            }
        ),
        Adapter({}),
        3,
    )


def update(state: State, client: str, weight: float, rows: Sequence[int], size: float = 0.1) -> Update:
    draw = np.random.default_rng([ord(client[0]), len(rows)])
    received = {PROMPT: take(state.adapter[PROMPT], rows), BIAS: state.adapter[BIAS]}
    received = {name: pair for name, pair in received.items() if pair.rank}
    trained = {
        name: Pair((pair.a + size * draw.standard_normal(pair.a.shape)).astype(np.float32), pair.b)
        for name, pair in received.items()
    }
    return Update(client, weight, Adapter(received), Adapter(trained))


def naive(state: State, updates: Sequence[Update], name: str) -> np.ndarray:
    """Entry by entry, in plain loops."""
    whole = state.adapter[name].product().astype(np.float64)
    for row in range(whole.shape[0]):
        owners = [u for u in updates if name in u.trained and u.received[name].b[row].any()]
        total = sum(u.weight for u in owners)
        for u in owners:
            at = int(u.received[name].b[row].argmax())
            step = u.trained[name].a[at].astype(np.float64) - u.received[name].a[at]
            whole[row] += u.discount * u.weight / total * step
    return whole


UNEQUAL = (("ann", 3.0, range(7)), ("bob", 1.0, range(2)), ("cyd", 5.0, range(4)), ("dan", 2.0, (3, 6)))


def fleet(state: State, size: float = 0.1) -> list[Update]:
    return [update(state, client, weight, list(rows), size) for client, weight, rows in UNEQUAL]


@each_method
def test_each_row_moves_by_the_mean_of_those_who_own_it(name: str) -> None:
    state = learnt()
    updates = [replace(each, discount=0.5) if each.client == "cyd" else each for each in fleet(state)]
    merged = aggregators.build(name).combine(state, updates).state
    for layer in SHAPES:
        np.testing.assert_allclose(merged.adapter[layer].a, naive(state, updates, layer), atol=1e-6)
        np.testing.assert_array_equal(merged.adapter[layer].b, np.eye(SHAPES[layer][0], dtype=np.float32))
    assert not len(merged.tail)


@each_method
def test_an_idle_round_changes_no_bit(name: str) -> None:
    state = learnt()
    after = aggregators.build(name).combine(state, fleet(state, size=0.0)).state
    assert after.adapter.digest() == state.adapter.digest()


@given(st.permutations(range(len(UNEQUAL))))
@settings(deadline=None, max_examples=20)
def test_the_order_of_arrival_leaves_no_trace(order: list[int]) -> None:
    state = learnt()
    updates = fleet(state)
    method = increment()
    one, other = (method.combine(state, given_).state for given_ in (updates, [updates[at] for at in order]))
    assert one.adapter.digest() == other.adapter.digest()


def test_two_halves_of_a_device_count_as_the_whole() -> None:
    state = learnt()
    whole = fleet(state)
    halves = [replace(whole[0], client=f"ann-{half}", weight=1.5) for half in (1, 2)]
    one, other = (increment().combine(state, updates).state for updates in (whole, [*halves, *whole[1:]]))
    for layer in SHAPES:
        np.testing.assert_allclose(one.adapter[layer].a, other.adapter[layer].a, atol=1e-6)


def test_rows_that_nobody_trained_stay_and_a_shorter_device_gets_the_first_ones() -> None:
    state = learnt()
    after = increment().combine(state, [update(state, "bob", 1.0, [0, 1])]).state.adapter[PROMPT]
    np.testing.assert_array_equal(after.a[2:], state.adapter[PROMPT].a[2:])
    assert not np.allclose(after.a[:2], state.adapter[PROMPT].a[:2])

    slot = Slot({PROMPT: LayerSlot(ROWS, WIDTH, held=3, trained=3)})
    np.testing.assert_array_equal(prefix(Adapter({PROMPT: after}), slot)[PROMPT].a, after.a[:3])


def test_an_increment_of_no_slice_owns_the_rows_that_it_moves_in_whatever_factors() -> None:
    """A gateway's: its factors are those of a sum, and no choice of rows."""
    state = learnt()
    moved = np.zeros((ROWS, WIDTH), np.float32)
    moved[[1, 4]] = np.random.default_rng(5).standard_normal((2, WIDTH))
    whole = decompose([(1.0, as_pair(moved, range(ROWS), ROWS))])
    sent = to_pair(whole, 0, 2)
    nothing = Pair(np.zeros((2, WIDTH), np.float32), np.zeros((ROWS, 2), np.float32))
    by = Update("gate", 4.0, Adapter({PROMPT: nothing}), Adapter({PROMPT: sent}))

    after = increment().combine(state, [by]).state.adapter[PROMPT]

    np.testing.assert_allclose(after.a, state.adapter[PROMPT].a + moved, atol=1e-5)
    np.testing.assert_array_equal(after.b, np.eye(ROWS, dtype=np.float32))


def test_a_sum_of_increments_alone_keeps_the_rows_that_moved() -> None:
    """What a gateway makes of its devices: their updates, merged into nothing."""
    state = learnt()
    updates = [update(state, "ann", 3.0, [0, 2]), update(state, "bob", 1.0, [2, 5])]
    zero = Pair(np.zeros((5, WIDTH), np.float32), np.zeros((ROWS, 5), np.float32))
    nothing = State(Adapter({PROMPT: zero, BIAS: Pair(np.zeros((1, WIDTH), np.float32), np.zeros((1, 1), np.float32))}),
                    Adapter({}), 3)  # fmt: skip
    summed = increment().combine(nothing, updates).state.adapter[PROMPT]

    np.testing.assert_allclose(
        summed.product(), naive(state, updates, PROMPT) - state.adapter[PROMPT].product(), atol=1e-6
    )
    assert summed.rank == 3


def test_a_tensor_taller_than_the_global_adapter_is_refused_before_anything_is_allocated() -> None:
    def said(rows: int) -> str:
        return unbearable(hello("a", groups=group(Slot({PROMPT: LayerSlot(rows, 8, 2, 1)}))), 16, 1 << 20)

    assert not said(16)
    assert "at most 16" in said(17)
    wide = hello("a", groups=group(Slot({PROMPT: LayerSlot(16, 1 << 20, 2, 1)})))
    assert "bytes" in unbearable(wide, 16, 1 << 20)


def test_tensors_begin_as_zeros_beside_pairs_and_are_saved_bit_for_bit() -> None:
    state = fresh_state({**SHAPES, PAIR: (8, 6)}, 4, seed=1)
    assert state.adapter.ranks == {PROMPT: 4, BIAS: 1, PAIR: 4}
    assert not state.adapter[PROMPT].product().any()
    np.testing.assert_array_equal(state.adapter[PROMPT].b, np.eye(ROWS, 4, dtype=np.float32))
    assert load_state(save_state(state)).adapter.digest() == state.adapter.digest()
