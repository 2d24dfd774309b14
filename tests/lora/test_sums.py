"""Whatever way a sum is taken, it is the dense sum within what the way says it lacks."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.lora import algebra, leading
from edge_runtime.lora.adapter import Pair
from edge_runtime.lora.algebra import decompose
from edge_runtime.lora.leading import Leading
from edge_runtime.lora.sketch import PROBES, probes_from
from edge_runtime.lora.streaming import Partial, absorb, join, nothing, scaled
from edge_runtime.lora.sums import total
from tests.lora.terms import Terms, best, columns, dense, directions, fleets, gauged, magnitude, product, shuffled
from tests.strategies import gaussian, laws

RANK, KEEP = 4, 8
seeds = st.integers(0, 1 << 16)
WAYS = ("exact", "sketch", "stream")
every_way = pytest.mark.parametrize("way", WAYS)


def taken(way: str, terms: Terms, *, rank: int = RANK, keep: int = KEEP, excess: float = 1e-4) -> Leading:
    """The sum by that way, although it may not be the cheapest."""
    worth = {"exact": 0.0, "sketch": float("inf"), "stream": float("inf")}[way]
    room = 1 if way == "stream" else 1 << 30
    with patch.object(leading, "SMALL", 0.0), patch.object(leading, "WORTH", worth):
        return total(iter(terms), directions(terms), rank, keep, seed="seed", excess=excess, room=room)


@every_way
@laws
@given(terms=fleets(), rank=st.integers(0, KEEP))
def test_the_certificate_is_never_violated(way: str, terms: Terms, rank: int) -> None:
    whole, found = dense(terms), taken(way, terms)
    error = float(np.linalg.norm(whole - product(found.spectrum, rank)))

    assert error <= found.certificate(rank) + 1e-12 * magnitude(terms)
    assert error >= best(whole, rank) * (1 - 1e-6) - 1e-12 * magnitude(terms)


@laws
@given(terms=fleets(), rank=st.integers(0, KEEP))
def test_an_exact_sum_is_the_dense_one_and_says_exactly_what_it_lacks(terms: Terms, rank: int) -> None:
    whole, found = dense(terms), taken("exact", terms)
    close = 1e-12 * magnitude(terms)

    assert found.how == "exact"
    assert found.norm == pytest.approx(float(np.linalg.norm(whole)), abs=close)
    assert found.truncated(rank) == pytest.approx(best(whole, rank), abs=close)
    assert found.truncated(rank) == pytest.approx(
        float(np.linalg.norm(whole - product(found.spectrum, rank))), abs=close
    )


@every_way
@laws
@given(terms=fleets())
def test_a_sum_of_few_directions_is_exact_to_one_part_in_a_hundred_thousand(way: str, terms: Terms) -> None:
    """Also where terms nearly cancel, as what was trained and what was received do; a stream, of its largest terms."""
    whole = dense(terms)
    found = taken(way, terms, rank=24, keep=24)

    if np.linalg.matrix_rank(whole, tol=1e-10 * magnitude(terms)) <= 24:
        close = 1e-5 * float(np.linalg.norm(whole)) + (1e-6 if way == "stream" else 1e-13) * magnitude(terms)
        assert float(np.linalg.norm(whole - product(found.spectrum, 24))) <= close
        assert found.truncated(24) <= 2 * close
        assert found.norm == pytest.approx(float(np.linalg.norm(whole)), rel=1e-4, abs=close)


@every_way
@laws
@given(terms=fleets())
def test_the_error_that_is_told_is_near_the_true_one(way: str, terms: Terms) -> None:
    whole, found = dense(terms), taken(way, terms)
    error, floor = float(np.linalg.norm(whole - product(found.spectrum, RANK))), 1e-5 * magnitude(terms)

    assert 0.4 * error - floor <= found.truncated(RANK) <= 2 * error + floor


@laws
@given(terms=fleets())
def test_a_sketch_is_as_near_to_the_optimum_as_asked_or_gives_way_to_the_exact_sum(terms: Terms) -> None:
    whole, found = dense(terms), taken("sketch", terms)
    error = float(np.linalg.norm(whole - product(found.spectrum, RANK)))

    assert error <= (1 + 1e-3) * best(whole, RANK) + 1e-5 * float(np.linalg.norm(whole)) + 1e-12 * magnitude(terms)


@every_way
@laws
@given(terms=fleets(), seed=seeds)
def test_order_and_gauge_leave_the_product_within_the_certificates(way: str, terms: Terms, seed: int) -> None:
    one = taken(way, terms)
    for others in (list(shuffled(terms, seed)), gauged(terms, seed)):
        two = taken(way, others)
        apart = float(np.linalg.norm(product(one.spectrum, KEEP) - product(two.spectrum, KEEP)))
        assert apart <= one.certificate(KEEP) + two.certificate(KEEP) + 1e-5 * magnitude(terms)
        assert abs(two.norm - float(np.linalg.norm(dense(others)))) <= two.certificate(KEEP) + 1e-5 * magnitude(terms)


@every_way
@laws
@given(terms=fleets())
def test_equal_inputs_give_equal_bytes(way: str, terms: Terms) -> None:
    one, two = taken(way, terms), taken(way, terms)

    assert (one.spectrum.u.tobytes(), one.spectrum.s.tobytes(), one.spectrum.vt.tobytes()) == (
        two.spectrum.u.tobytes(), two.spectrum.s.tobytes(), two.spectrum.vt.tobytes(),
    )  # fmt: skip
    assert (one.norm, one.lacking, one.bound, one.how, one.why) == (two.norm, two.lacking, two.bound, two.how, two.why)


@laws
@given(terms=fleets())
def test_a_stream_is_the_whole_sum_within_its_certificate(terms: Terms) -> None:
    batch, stream = taken("exact", terms), taken("stream", terms)

    if directions(terms) > 4 * KEEP:
        assert stream.how == "stream"
        assert "chunks" in stream.why
    apart = float(np.linalg.norm(product(batch.spectrum, KEEP) - product(stream.spectrum, KEEP)))
    assert apart <= batch.certificate(KEEP) + stream.certificate(KEEP) + 1e-12 * magnitude(terms)


def test_a_stream_takes_one_term_at_a_time_and_each_once() -> None:
    """However many there are, no more of them are alive than fit into the room."""
    alive, most = 0, 0

    def made() -> Iterator[tuple[float, Pair]]:
        nonlocal alive, most
        for index in range(60):
            alive, most = alive + 1, max(most, alive + 1)
            yield 1.0, gaussian((16, 12), 3, index)
            alive -= 1

    found = total(made(), 180, 2, 4, seed="s", room=1)
    assert found.how == "stream"
    assert most == 1


# ── the choice ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_cheaper_way_is_chosen_and_says_why() -> None:
    narrow, wide = (gaussian((900, 900), rank, 1) for rank in (40, 600))
    exact = total([(1.0, narrow)], 40, 8, 8, seed="s")
    sketched = total([(1.0, wide)], 600, 8, 8, seed="s", excess=0.05)

    assert (exact.how, sketched.how) == ("exact", "sketch")
    assert "40 columns" in exact.why
    assert "600 columns" in sketched.why
    assert "by a sketch of 28" in sketched.why
    assert sketched.norm == pytest.approx(algebra.norm(wide), rel=0.05)


@pytest.mark.parametrize(("ranks", "chunks"), [((64, 8), 1), ((64, 16), 2), ((64, 64, 8), 2), ((64, 64, 9), 3)])
def test_no_chunk_is_begun_for_a_few_columns(ranks: tuple[int, ...], chunks: int) -> None:
    terms = [(1.0, gaussian((20, 12), rank, rank)) for rank in ranks]
    found = total(iter(terms), sum(ranks), 2, 4, seed="s", room=64 * 4 * 32)

    assert found.how == "exact" if chunks == 1 else f"in {chunks} chunks" in found.why
    error = float(np.linalg.norm(dense(terms) - product(found.spectrum, 4)))
    assert best(dense(terms), 4) * (1 - 1e-6) <= error <= found.certificate(4)


def test_a_sketch_that_does_not_get_near_enough_gives_way() -> None:
    terms: Terms = [(1.0, gaussian((40, 40), 60, 1))]
    with patch("edge_runtime.lora.sketch.MOST_STEPS", 1):
        found = taken("sketch", terms, excess=1e-12)

    assert found.how == "exact"
    assert "excess stayed" in found.why


def test_gram_matrices_make_the_error_of_a_sketch_exact_where_they_are_cheap() -> None:
    terms: Terms = [(1.0, gaussian((60, 50), 40, 1))]
    with patch.object(leading, "GRAMS_WORTH", float("inf")):
        found = taken("sketch", terms)

    assert "Gram" in found.why
    error = float(np.linalg.norm(dense(terms) - product(found.spectrum, RANK)))
    assert found.truncated(RANK) == pytest.approx(error, rel=1e-5)
    assert error <= found.certificate(RANK) <= error * 1.001


# ── degenerate sums ───────────────────────────────────────────────────────────────────────────────────────────────


@every_way
@pytest.mark.parametrize(
    "terms",
    [
        [(1.0, algebra.zero((9, 7), 40))],
        [(1.0, algebra.zero((9, 7), 0))],
        [(0.0, gaussian((9, 7), 40, 1))],
        [(-2.0, gaussian((9, 7), 40, 1))],
        [(1.0, algebra.take(gaussian((9, 7), 2, 1), [0] * 40))],
        [(1.0, gaussian((9, 7), 1, 1))],
        [(1.0, gaussian((1, 1), 40, 1))],
    ],
    ids=["zero", "no direction", "no weight", "negative", "deficient", "one direction", "one number"],
)
def test_degenerate_sums_are_sums(way: str, terms: Terms) -> None:
    whole, found = dense(terms), taken(way, terms)

    np.testing.assert_allclose(product(found.spectrum, KEEP), whole, atol=1e-5 * (1e-30 + magnitude(terms)))
    assert float(np.linalg.norm(whole - product(found.spectrum, KEEP))) <= found.certificate(KEEP) + 1e-300


def test_equal_singular_values_lose_no_more_than_they_must() -> None:
    """Which of them are kept is open; how much they carry is not."""
    terms: Terms = [(1.0, Pair(np.eye(30, dtype=np.float32), np.eye(30, dtype=np.float32)))]
    for way in WAYS[:2]:
        found = taken(way, terms)
        np.testing.assert_allclose(found.spectrum.s[:KEEP], 1.0, rtol=1e-5)
        assert found.truncated(RANK) == pytest.approx(26**0.5, rel=0.3)


def test_a_sum_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        total([], 0, 1, 1, seed="s")


# ── partial sums ──────────────────────────────────────────────────────────────────────────────────────────────────


def partial(terms: Terms, cap: int = KEEP) -> Partial:
    return absorb(nothing(terms[0][1].shape), [columns(terms)], RANK, cap, seed="p")


@laws
@given(fleets(), seeds)
def test_partial_sums_join_in_any_grouping_within_what_the_cuts_leave_out(terms: Terms, seed: int) -> None:
    whole = dense(terms)
    at = np.sort(np.random.default_rng(seed).integers(0, len(terms) + 1, 2))
    x, y, z = (
        partial(list(part)) if part else nothing(whole.shape)
        for part in (terms[: at[0]], terms[at[0] : at[1]], terms[at[1] :])
    )

    def joined(one: Partial, two: Partial) -> Partial:
        return join(one, two, RANK, KEEP, seed="j")

    for found in (joined(joined(x, y), z), joined(x, joined(y, z)), joined(joined(z, x), y)):
        error = float(np.linalg.norm(whole - product(found.spectrum, KEEP)))
        assert error <= found.bound + 1e-12 * magnitude(terms)
        assert found.spectrum.s.size <= KEEP


@laws
@given(fleets(), st.floats(0.01, 100))
def test_a_partial_sum_is_divided_at_the_end(terms: Terms, factor: float) -> None:
    found = scaled(partial(terms), factor)
    exact = decompose([(factor * weight, pair) for weight, pair in terms])

    np.testing.assert_allclose(found.spectrum.s[:RANK], exact.s[:RANK], atol=1e-4 * factor * magnitude(terms))
    assert float(np.linalg.norm(factor * dense(terms) - product(found.spectrum, KEEP))) <= found.bound * (1 + 1e-9)


def test_what_all_cuts_left_out_adds_up_under_their_probes() -> None:
    """So the error of a stream is known much nearer than by the sum of what each cut left out."""
    terms: Terms = [(1.0, gaussian((40, 30), 9, seed)) for seed in range(6)]
    probes, found = probes_from("p", 30), nothing((40, 30), PROBES)
    for each in terms:
        found = absorb(found, [columns([each])], RANK, KEEP, seed="p", probes=probes)

    left = dense(terms) - product(found.spectrum, KEEP)
    np.testing.assert_allclose(found.missed, left @ probes, atol=1e-5 * magnitude(terms))
    assert float(np.linalg.norm(left)) < 0.9 * found.bound


def test_a_partial_sum_is_not_turned_around() -> None:
    with pytest.raises(ValueError, match="positive number; found 0"):
        scaled(nothing((3, 4)), 0.0)
