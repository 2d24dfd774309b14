"""The range finder against the dense singular values: how near it comes, and what it says about that."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.lora.adapter import Pair
from edge_runtime.lora.algebra import decompose
from edge_runtime.lora.columns import magnitude
from edge_runtime.lora.sketch import SHARE, sketch
from tests.lora.terms import Terms, best, columns, dense, fleets, gauged, product
from tests.strategies import gaussian, laws

EXCESS = 1e-4
widths = st.tuples(st.integers(1, 6), st.integers(6, 14))


@laws
@given(fleets(), widths)
def test_a_cut_is_as_near_as_asked_to_the_best_there_is(terms: Terms, sizes: tuple[int, int]) -> None:
    whole, (rank, width) = dense(terms), sizes
    found = sketch([columns(terms)], rank, rank + width, excess=EXCESS, seed="a")
    error, least = float(np.linalg.norm(whole - product(found.spectrum, rank))), best(whole, rank)

    if found.excess <= EXCESS:
        assert error <= (1 + 10 * EXCESS) * least + 1e-5 * float(np.linalg.norm(whole))
    assert error >= least * (1 - 1e-6)


@laws
@given(fleets(), widths)
def test_what_is_lacking_is_estimated_and_the_bound_is_never_exceeded(terms: Terms, sizes: tuple[int, int]) -> None:
    whole, (rank, width) = dense(terms), sizes
    found = sketch([columns(terms)], rank, rank + width, excess=EXCESS, seed="b")
    truth = float(np.linalg.norm(whole - product(found.spectrum, rank + width)))
    rounding = 1e-5 * float(np.linalg.norm(whole)) + found.rounding

    assert truth <= found.bound + found.rounding + 1e-12 * magnitude([columns(terms)])
    assert truth * SHARE**0.5 - rounding <= found.lacking <= 3 * truth + rounding


@laws
@given(fleets())
def test_a_sum_of_few_directions_is_found_exactly(terms: Terms) -> None:
    """To 1e-5 of the sum, also where the terms are many thousand times larger: then float64 is used."""
    whole = dense(terms)
    found = sketch([columns(terms)], 24, 24, excess=EXCESS, seed="c")

    if min(whole.shape) == 24 or np.linalg.matrix_rank(whole, tol=1e-9 * magnitude([columns(terms)])) <= 24:
        np.testing.assert_allclose(product(found.spectrum, 24), whole, atol=1e-5 * float(np.linalg.norm(whole)))


def test_nearly_cancelling_terms_are_added_in_float64() -> None:
    one, small = gaussian((40, 30), 6, 1), gaussian((40, 30), 6, 2)
    terms: Terms = [(1.0, one), (1e-5, small), (-1.0, one)]
    found = sketch([columns(terms)], 6, 12, excess=EXCESS, seed="d")

    assert found.precision is np.float64
    expected = dense([(1e-5, small)])
    np.testing.assert_allclose(product(found.spectrum, 6), expected, atol=1e-5 * float(np.linalg.norm(expected)))


def test_an_ordinary_sum_is_added_in_float32() -> None:
    found = sketch([columns([(1.0, gaussian((40, 30), 20, 1))])], 6, 12, excess=EXCESS, seed="d")

    assert found.precision is np.float32


@laws
@given(fleets())
def test_a_spectrum_is_orthonormal_falling_signed_and_decided_by_its_seed(terms: Terms) -> None:
    one, two, other = (sketch([columns(terms)], 4, 12, excess=EXCESS, seed=seed).spectrum for seed in ("e", "e", "f"))

    np.testing.assert_allclose(one.u.T @ one.u, np.eye(12), atol=1e-12)
    np.testing.assert_allclose(one.vt @ one.vt.T, np.eye(12), atol=1e-12)
    assert (np.diff(one.s) <= 0).all()
    assert all(column[np.argmax(np.abs(column))] > 0 for column in one.u.T)
    assert (one.u.tobytes(), one.s.tobytes(), one.vt.tobytes()) == (two.u.tobytes(), two.s.tobytes(), two.vt.tobytes())
    assert other.u.tobytes() != one.u.tobytes()


@laws
@given(fleets(), st.integers(0, 99))
def test_other_factors_of_the_same_products_have_the_same_leading_values(terms: Terms, seed: int) -> None:
    one, two = (sketch([columns(t)], 3, 16, excess=1e-6, seed="g").spectrum.s for t in (terms, gauged(terms, seed)))
    close = 1e-3 * (one[0] + 1e-30) + 1e-5 * magnitude([columns(terms)])

    np.testing.assert_allclose(one[:3], two[:3], atol=close)


def test_steps_go_on_until_the_excess_is_small_and_end_at_last() -> None:
    """A spectrum that hardly falls takes more steps for a smaller excess; no step is taken that is not needed."""
    terms: Terms = [(1.0, gaussian((40, 40), 40, 3))]
    few, many = (sketch([columns(terms)], 8, 10, excess=excess, seed="h") for excess in (1e-2, 1e-6))
    low = sketch([columns([(1.0, gaussian((40, 40), 4, 3))])], 8, 10, excess=1e-6, seed="h")

    assert few.steps < many.steps <= 12
    assert low.steps <= 1
    assert low.lacking < 1e-10 * low.spectrum.s[0]


SPECTRA = {
    "harmonic": 1 / np.arange(1.0, 201),
    "slow": np.arange(1.0, 201) ** -0.5,
    "exponential": np.exp(-np.arange(200) / 20),
    "plateau": np.r_[1 / np.arange(1.0, 21), np.full(180, 0.01)],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("excess", [1e-2, 1e-3, 1e-4])
def test_what_more_steps_would_gain_is_foreseen_from_the_last_one(spectrum: str, excess: float) -> None:
    """Whatever way the spectrum falls: what is told is not much less than what is true."""
    s, draw = SPECTRA[spectrum], np.random.default_rng(1)
    u, v = (np.linalg.qr(draw.standard_normal((200, 200)))[0] for _ in range(2))
    terms: Terms = [(1.0, Pair(v.T.astype(np.float32), (u * s).astype(np.float32)))]
    found = sketch([columns(terms)], 16, 32, excess=excess, seed="k")
    reached = float(np.linalg.norm(dense(terms) - product(found.spectrum, 16))) / best(dense(terms), 16) - 1

    assert reached <= excess
    assert found.steps >= 1
    assert 0.5 * reached - 1e-6 <= found.excess <= excess


def test_all_directions_lack_nothing() -> None:
    pair = gaussian((12, 9), 30, 1)
    found = sketch([columns([(1.0, pair)])], 9, 9, excess=EXCESS, seed="i")

    np.testing.assert_allclose(found.spectrum.s, decompose([(1.0, pair)]).s[:9], rtol=1e-5)
    assert found.lacking < 1e-5 * found.spectrum.s[0]


@pytest.mark.parametrize("width", [0, 10])
def test_a_range_of_no_directions_or_of_too_many_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 9 directions; found {width}"):
        sketch([columns([(1.0, gaussian((12, 9), 3, 1))])], 1, width, excess=EXCESS, seed="j")
