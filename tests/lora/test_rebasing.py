"""What is a device's own, on another version: the same function in another gauge, and the best one elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.lora import rebasing
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import decompose, take, to_pair
from edge_runtime.lora.dense import as_pair
from edge_runtime.lora.factors import Private

D_OUT, D_IN, HELD = 14, 20, 6
NAME = "model.layers.0.self_attn.q_proj"
CLOSE = 1e-5
"""Of the largest number: what a re-based part may differ by."""
seeds = st.integers(0, 2**32 - 1)


def pair(draw: np.random.Generator, rank: int = HELD, size: float = 1.0, d_out: int = D_OUT) -> Pair:
    a, b = draw.standard_normal((rank, D_IN)), size * draw.standard_normal((d_out, rank))
    return Pair(a.astype(np.float32), b.astype(np.float32))


def rotation(draw: np.random.Generator, rank: int = HELD) -> np.ndarray:
    return np.linalg.qr(draw.standard_normal((rank, rank)))[0]


def turned(found: Pair, by: np.ndarray) -> Pair:
    """The same product in another gauge."""
    return Pair((by @ found.a).astype(np.float32), (found.b @ by.T).astype(np.float32))


def trained(draw: np.random.Generator, found: Pair, rows: int) -> Pair:
    """The pair after personal training of its first rows."""
    a, b = found.a.copy(), found.b.copy()
    a[:rows] += (0.1 * draw.standard_normal((rows, D_IN))).astype(np.float32)
    b[:, :rows] += (0.3 * draw.standard_normal((D_OUT, rows))).astype(np.float32)
    return Pair(a, b)


def dense(found: Pair) -> np.ndarray:
    return found.b.astype(np.float64) @ found.a.astype(np.float64)


def of(found: Pair) -> Adapter:
    return Adapter({NAME: found})


def near(found: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.abs(found - wanted).max() <= CLOSE * np.abs(wanted).max())


@given(seeds, st.integers(1, HELD))
def test_a_personal_adapter_is_the_same_function_when_the_gauge_alone_changed(seed: int, rows: int) -> None:
    draw = np.random.default_rng(seed)
    before = pair(draw)
    personal = trained(draw, before, rows)
    change = rebasing.apart(of(personal), of(before))
    after = turned(before, rotation(draw))
    found = rebasing.carried(of(after), change)[NAME]
    assert found.rank == HELD
    assert near(dense(found), dense(personal))


@given(seeds)
def test_a_personal_change_is_a_product_exactly_and_of_no_more_rank_than_moved(seed: int) -> None:
    draw = np.random.default_rng(seed)
    before = pair(draw)
    personal = trained(draw, before, 2)
    change = rebasing.apart(of(personal), of(before))[NAME]
    assert change.rank <= 4
    assert near(dense(change), dense(personal) - dense(before))


def test_what_did_not_move_is_no_change() -> None:
    held = of(pair(np.random.default_rng(0)))
    assert not rebasing.apart(held, held)
    assert rebasing.carried(held, Adapter({}))[NAME] is held[NAME]


@given(seeds)
def test_on_a_version_that_has_learnt_the_change_is_kept_as_well_as_its_rank_permits(seed: int) -> None:
    """Against the dense sum, truncated: nothing of that rank is nearer."""
    draw = np.random.default_rng(seed)
    before, after = pair(draw), pair(draw)
    change = rebasing.apart(of(trained(draw, before, 2)), of(before))
    wanted = dense(after) + dense(change[NAME])
    s = np.linalg.svd(wanted, compute_uv=False)
    error = np.linalg.norm(dense(rebasing.carried(of(after), change)[NAME]) - wanted)
    assert error == pytest.approx(np.sqrt(np.sum(s[HELD:] ** 2)), rel=1e-4)


def test_a_carried_adapter_lies_in_the_rows_of_its_version() -> None:
    """So what is trained next are nearly the directions that the fleet trains."""
    draw = np.random.default_rng(3)
    before = to_pair(decompose([(1.0, pair(draw))]), 0, HELD)
    small = Pair(before.a, before.b + (1e-4 * draw.standard_normal(before.b.shape)).astype(np.float32))
    after = turned(before, rotation(draw))
    found = rebasing.carried(of(after), rebasing.apart(of(small), of(before)))[NAME]
    assert np.abs(found.a - after.a).max() < 1e-2 * np.abs(after.a).max()


def test_a_device_that_holds_another_rank_now_keeps_its_change_as_well() -> None:
    draw = np.random.default_rng(4)
    before = pair(draw, 3)
    change = rebasing.apart(of(trained(draw, before, 3)), of(before))
    after = to_pair(decompose([(1.0, before)]), 0, HELD + 3)
    wider = Pair(np.pad(after.a, ((0, 6), (0, 0))), np.pad(after.b, ((0, 0), (0, 6))))
    found = rebasing.carried(of(wider), change)[NAME]
    assert found.rank == wider.rank
    assert near(dense(found), dense(before) + dense(change[NAME]))


def test_a_layer_of_another_shape_or_of_none_stays_as_it_was_received() -> None:
    draw = np.random.default_rng(5)
    other = Adapter({NAME: pair(draw, d_out=9), "new": pair(draw)})
    found = rebasing.carried(other, of(pair(draw, 2)))
    assert all(found[name] is other[name] for name in other)


def test_of_a_tensor_the_rows_move_and_no_factor_is_mixed() -> None:
    draw = np.random.default_rng(6)
    name = "model.layers.0.mlp.up_proj#bias"
    values = [draw.standard_normal((3, D_IN)).astype(np.float32) for _ in range(3)]
    before, personal, after = (Adapter({name: as_pair(value, (0, 1, 2), 4)}) for value in values)
    found = rebasing.carried(after, rebasing.apart(personal, before))[name]
    np.testing.assert_allclose(found.a, values[2] + values[1] - values[0], atol=1e-6)
    assert np.array_equal(found.b, after[name].b)


@given(seeds, st.sampled_from(["a", "b"]))
def test_a_private_factor_is_the_same_function_when_the_shared_one_has_turned(seed: int, private: Private) -> None:
    draw = np.random.default_rng(seed)
    mine = pair(draw)
    after = turned(mine, rotation(draw))
    nothing = (np.zeros_like(mine.a), after.b) if private == "a" else (after.a, np.zeros_like(mine.b))
    found = rebasing.turned(of(mine), of(Pair(*nothing)), private)[NAME]
    assert near(dense(found), dense(mine))


def test_a_private_factor_beside_a_stranger_stays_as_it_was() -> None:
    mine = pair(np.random.default_rng(7), 2)
    found = rebasing.turned(of(mine), of(pair(np.random.default_rng(8), 2)), "b")[NAME]
    assert np.array_equal(found.b, mine.b)


def test_a_private_factor_of_another_rank_has_no_place() -> None:
    assert not rebasing.turned(of(pair(np.random.default_rng(7), 2)), of(pair(np.random.default_rng(8), 3)), "b")


@given(seeds, st.integers(1, 9))
def test_a_change_at_another_rank_is_its_best_or_itself_with_room_to_learn(seed: int, rank: int) -> None:
    change = pair(np.random.default_rng(seed), 4)
    found = rebasing.of_rank(change, rank, "seed")
    s = np.linalg.svd(dense(change), compute_uv=False)
    assert found.rank == rank
    assert np.linalg.norm(dense(found) - dense(change)) == pytest.approx(
        np.sqrt(np.sum(s[rank:] ** 2)), abs=1e-4 * s[0]
    )
    assert (np.linalg.norm(found.a, axis=1) > 0).all(), "a row of zeros would learn nothing"


def test_beside_is_the_sum_of_both_products() -> None:
    draw = np.random.default_rng(9)
    one, other = pair(draw), pair(draw, 2)
    both = rebasing.stacked(Adapter({NAME: one, "plain": one}), {NAME: other})
    np.testing.assert_allclose(dense(both[NAME]), dense(one) + dense(other), rtol=1e-12, atol=1e-12)
    assert both["plain"] is one
    assert np.array_equal(rebasing.last(both[NAME], 2).a, other.a)
    assert np.array_equal(take(both[NAME], range(HELD)).b, one.b)
