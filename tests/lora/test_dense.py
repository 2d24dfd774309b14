"""Dense tensors as pairs: the product is the tensor, and rows keep their numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import cut, take
from edge_runtime.lora.dense import as_pair, dense_name, first_rows, followed, is_dense, path_of, rows_of, tensor_of
from edge_runtime.wire import bands, codec, feedback, update
from edge_runtime.wire.codec import CODECS

NAME = dense_name("model.layers.0.self_attn.k_proj", "prefix")


def tensor(rows: int, width: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, rows]).standard_normal((rows, width)).astype(np.float32)


def test_a_name_says_of_which_module_and_which_tensor() -> None:
    assert is_dense(NAME)
    assert (path_of(NAME), tensor_of(NAME)) == ("model.layers.0.self_attn.k_proj", "prefix")
    assert not is_dense("model.layers.0.self_attn.k_proj")
    assert (path_of("a.b"), tensor_of("a.b")) == ("a.b", "")


def test_the_product_is_the_tensor_and_a_cut_its_first_rows() -> None:
    values = tensor(5)
    whole = as_pair(values, range(5), 5)
    short = cut(whole, 2).product()

    np.testing.assert_array_equal(whole.product(), values)
    np.testing.assert_array_equal(short[:2], values[:2])
    assert not short[2:].any()


@given(st.lists(st.integers(0, 7), unique=True, max_size=8))
def test_a_slice_knows_its_rows(rows: list[int]) -> None:
    values = tensor(8)
    part = take(as_pair(values, range(8), 8), rows)
    found = rows_of(part)

    assert found is not None
    assert found.tolist() == rows
    np.testing.assert_array_equal(part.a, values[rows])


def test_a_sum_is_no_choice_of_rows() -> None:
    assert rows_of(Pair(tensor(2), np.zeros((5, 2), np.float32))) is None
    assert rows_of(Pair(tensor(2), np.ones((5, 2), np.float32))) is None
    assert rows_of(Pair(tensor(2), np.eye(5, 2, dtype=np.float32) * 0.5)) is None
    assert rows_of(Pair(tensor(2), np.eye(5, dtype=np.float32)[:, [1, 1]])) is None


@pytest.mark.parametrize("name", sorted(set(CODECS) - {"none"}))
def test_every_codec_of_the_downlink_leaves_the_rows_where_they_are(name: str) -> None:
    whole = Adapter({NAME: as_pair(tensor(6, 64), range(6), 6)})
    parts = [codec.decode(codec.encode(bands.band(whole, *edges), name)) for edges in ((0, 4), (4, 6))]

    found = rows_of(bands.join(parts)[NAME])
    assert found is not None
    assert found.tolist() == list(range(6))
    first = rows_of(bands.join(parts[:1])[NAME])
    assert first is not None
    assert first.tolist() == list(range(4))


@pytest.mark.parametrize("name", sorted(set(CODECS) - {"none"}))
def test_no_codec_of_the_uplink_makes_something_of_a_change_of_no_columns(name: str) -> None:
    change = Adapter({NAME: Pair(tensor(4, 64), np.zeros((6, 4), np.float32))})
    assert not codec.decode(codec.encode(change, name))[NAME].b.any()


def test_what_is_owed_of_a_row_follows_the_row_and_of_another_is_lost() -> None:
    whole = as_pair(tensor(6), range(6), 6)
    debt = Pair(tensor(3, seed=1), np.zeros((6, 3), np.float32))
    before, after = take(whole, [0, 1, 4]), take(as_pair(tensor(6, seed=2), range(6), 6), [1, 4, 5])
    owed = feedback.Residual(Adapter({NAME: debt}), Adapter({NAME: before}), {NAME: (0, 1, 4)})
    nothing = Pair(np.zeros((3, 6), np.float32), np.zeros((6, 3), np.float32))

    wanted = feedback.wanted(Adapter({NAME: nothing}), Adapter({NAME: after}), owed, {NAME: (1, 4, 5)})[NAME]

    np.testing.assert_array_equal(wanted.a, np.stack([debt.a[1], debt.a[2], np.zeros(6, np.float32)]))
    assert not wanted.b.any()
    np.testing.assert_array_equal(followed(after, before), [[0, 1, 0], [0, 0, 1], [0, 0, 0]])


def test_an_identity_that_a_codec_rounded_is_exact_again() -> None:
    rounded = Pair(tensor(2), np.array([[0.99, 0], [0, 1.01], [0, 0]], np.float32))
    np.testing.assert_array_equal(first_rows(rounded).b, np.eye(3, 2, dtype=np.float32))


@pytest.mark.parametrize("rows", [range(4), (1, 3, 5)])
def test_the_automatic_codec_and_error_feedback_deliver_the_whole_change_in_time(rows: Sequence[int]) -> None:
    """What was sent and what is owed are the change; nothing of either is in the columns."""
    whole = as_pair(tensor(6, 4000), range(6), 6)
    received = Adapter({NAME: take(whole, list(rows))})
    change = Adapter({NAME: Pair(tensor(len(rows), 4000, seed=3), np.zeros((6, len(rows)), np.float32))})
    made = update.make(change, received, feedback.NONE, update.Terms("auto"), {NAME: tuple(rows)})
    owed = made.residual.owed[NAME]

    np.testing.assert_allclose(made.sent[NAME].a + owed.a, change[NAME].a, atol=1e-6)
    assert np.linalg.norm(made.sent[NAME].a) > 0.5 * np.linalg.norm(change[NAME].a)
    assert not made.sent[NAME].b.any()
    assert not owed.b.any()
    again = feedback.load(feedback.dump(made.residual))
    later = feedback.wanted(change, received, again, {NAME: tuple(rows)})
    np.testing.assert_allclose(later[NAME].a, change[NAME].a + owed.a, atol=1e-6)
