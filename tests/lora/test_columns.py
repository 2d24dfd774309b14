"""The operator against the dense sum that it never forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.lora import algebra
from edge_runtime.lora.adapter import Pair
from edge_runtime.lora.algebra import cut, decompose
from edge_runtime.lora.columns import (
    Columns,
    backward,
    chunks,
    distinct,
    forward,
    magnitude,
    of_spectrum,
    squared_norm,
    stacked,
)
from tests.lora.terms import Terms, columns, dense, directions, fleets, product, weighted
from tests.strategies import gaussian, laws

SINGLE = float(np.finfo(np.float32).eps)


@laws
@given(weighted(), st.sampled_from([np.float32, np.float64]), st.integers(0, 3))
def test_both_products_equal_those_with_the_dense_sum(terms: Terms, precision: type[np.floating], many: int) -> None:
    whole, found = dense(terms), columns(terms)
    rng = np.random.default_rng(many)
    x, y = rng.standard_normal((whole.shape[1], many)), rng.standard_normal((whole.shape[0], many))
    close = (32 * SINGLE if precision is np.float32 else 1e-13) * (1e-9 + magnitude([found])) * 10

    np.testing.assert_allclose(forward([found], x, precision), whole @ x, atol=close)
    np.testing.assert_allclose(backward([found], y, precision), whole.T @ y, atol=close)


def copied(terms: Terms, capacity: int) -> list[Columns]:
    """All chunks; each is good until the next is taken."""
    return [Columns(part.b.copy(), part.a.copy(), part.w.copy()) for part in chunks(terms, capacity)]


@laws
@given(weighted(), st.integers(1, 9))
def test_chunks_are_full_but_for_the_last_and_together_are_the_sum(terms: Terms, capacity: int) -> None:
    found = copied(terms, capacity)
    total = sum((b @ a for b, a in (stacked([part]) for part in found)), np.zeros(terms[0][1].shape))

    assert [part.count for part in found[:-1]] == [capacity] * (len(found) - 1)
    assert sum(part.count for part in found) == directions(terms)
    np.testing.assert_allclose(total, dense(terms), atol=1e-12 * (1 + magnitude(found)))


def test_terms_of_unlike_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(4, 3\)"):
        list(chunks([(1.0, algebra.zero((3, 4), 1)), (1.0, algebra.zero((4, 3), 1))], 8))


@laws
@given(fleets(), st.sampled_from([np.float32, np.float64]))
def test_gram_matrices_give_the_norm_of_the_sum(terms: Terms, precision: type[np.floating]) -> None:
    found = columns(terms)
    eps = SINGLE if precision is np.float32 else 1e-15
    close = 64 * eps * magnitude([found]) ** 2

    assert squared_norm([found], precision) == pytest.approx(float(np.sum(dense(terms) ** 2)), abs=close)


def test_gram_matrices_are_added_up_over_parts_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_runtime.lora.columns.BLOCK", 3)
    terms: Terms = [(0.5, gaussian((9, 8), 7, 1)), (-2.0, gaussian((9, 8), 4, 2))]
    parts = copied(terms, 5)

    assert len(parts) == 3
    assert squared_norm(parts, np.float64) == pytest.approx(float(np.sum(dense(terms) ** 2)), rel=1e-12)


@laws
@given(weighted(), st.integers(0, 6))
def test_the_directions_of_a_spectrum_are_columns(terms: Terms, count: int) -> None:
    spectrum = decompose(terms)
    part = of_spectrum(spectrum, count)

    np.testing.assert_allclose(
        forward([part], np.eye(part.shape[1]), np.float64),
        product(spectrum, count),
        atol=1e-12 * (1 + spectrum.s.sum()),
    )


@laws
@given(weighted())
def test_equal_directions_are_one_and_the_product_stays(terms: Terms) -> None:
    twice = [*terms, *((0.5 * weight, cut(pair, 2)) for weight, pair in terms)]
    found = distinct(twice)
    close = 1e-12 * (1 + magnitude([columns(twice)]))

    if found is None:
        np.testing.assert_allclose(dense(twice), 0, atol=close)
        return
    weights, pair = found
    assert pair.rank <= directions(terms)
    np.testing.assert_allclose(
        (pair.b.astype(np.float64) * weights) @ pair.a.astype(np.float64), dense(twice), atol=close
    )


def test_slices_of_one_version_leave_no_more_than_the_version() -> None:
    version = gaussian((9, 7), 5, 1)
    copy = Pair(version.a.copy(), version.b.copy())
    found = distinct([(1.0, version), *((-0.25, cut(copy if r % 2 else version, r)) for r in (1, 2, 5, 5))])

    assert found is not None
    weights, pair = found
    # All four slices have the first direction, and cancel it.
    assert pair.rank == 4
    np.testing.assert_array_equal(weights, [0.25, 0.5, 0.5, 0.5])
    np.testing.assert_array_equal(pair.a, version.a[1:])


def test_what_cancels_to_the_last_bit_is_gone() -> None:
    pair = gaussian((5, 4), 3, 1)

    assert distinct([(1.0, pair), (-0.5, pair), (-0.5, Pair(pair.a.copy(), pair.b.copy()))]) is None
    assert distinct([(1.0, algebra.zero((5, 4), 3))]) is None


def test_magnitude_sees_what_cancels() -> None:
    pair = gaussian((5, 4), 1, 1)
    both = columns([(2.0, pair), (-2.0, pair)])

    assert magnitude([both]) == pytest.approx(8**0.5 * float(np.linalg.norm(pair.product())), rel=1e-6)
    assert magnitude([Columns(both.b[:0], both.a[:0], both.w[:0])]) == 0.0
