"""What is too large to be merged, judged without I/O."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import changed, distance
from server.screening import Limits, absurd, moved
from tests.strategies import laws

SIZES = st.floats(1e-3, 1e3)


def pair(seed: int, rank: int = 2, size: float = 1.0) -> Pair:
    draw = np.random.default_rng(seed)
    b = size * draw.standard_normal((5, rank))
    return Pair(draw.standard_normal((rank, 6)).astype(np.float32), b.astype(np.float32))


@laws
@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 2**32 - 2))
def test_the_distance_is_that_of_the_products(rank, other_rank, seed) -> None:
    x, y = pair(seed, rank), pair(seed + 1, other_rank)
    exact = float(np.linalg.norm(x.b.astype(float) @ x.a.astype(float) - y.b.astype(float) @ y.a.astype(float)))
    assert distance(x, y) == pytest.approx(exact, rel=1e-6)
    assert distance(x, x) == pytest.approx(0.0, abs=1e-5)


def test_an_update_moves_the_model_by_all_its_layers_together() -> None:
    received = Adapter({"x": pair(0), "y": pair(1)})
    change = {"x": pair(2, size=0.1), "y": pair(3, size=0.2)}
    trained = Adapter({name: changed(received[name], change[name]) for name in received})
    exact = np.sqrt(sum(np.sum((trained[n].product() - received[n].product()) ** 2) for n in received))
    assert moved(received, trained) == pytest.approx(float(exact), rel=1e-5)


@laws
@given(st.lists(SIZES, max_size=12), SIZES, st.floats(1.5, 100))
def test_nobody_within_the_ratio_of_the_median_is_refused_and_nobody_beyond_is_taken(accepted, norm, ratio) -> None:
    usual = float(np.median(accepted)) if len(accepted) >= 3 else np.inf
    assert bool(absurd(norm, accepted, Limits(ratio))) == (norm > ratio * usual)


@laws
@given(st.lists(SIZES, min_size=3, max_size=12), st.floats(1e6, 1e30))
def test_a_minority_does_not_move_the_yardstick(honest, size) -> None:
    """Whatever few liars there are, who got in when there was no yardstick, a further one is measured by the honest."""
    liars = [size] * ((len(honest) - 1) // 2)
    assert absurd(size, [*honest, *liars], Limits(20.0))


def test_a_fixed_limit_holds_from_the_first_update() -> None:
    assert "up to 5" in absurd(6.0, [], Limits(20.0, 5.0))
    assert absurd(5.0, [], Limits(20.0, 5.0)) == ""
    assert "not finite" in absurd(float("inf"), [], Limits(20.0))
    assert absurd(3.0, [0.0] * 5, Limits(20.0)) == "", "where nobody moved there is no yardstick"


def test_where_devices_keep_b_for_themselves_a_is_looked_at() -> None:
    nothing, before, after = (
        Adapter({"q": Pair(np.full((2, 3), size, np.float32), np.zeros((4, 2), np.float32))}) for size in (0, 1, 3)
    )
    assert moved(before, after) == pytest.approx(24**0.5)
    assert moved(before, before) == 0.0
    assert moved(nothing, after) == 0.0, "an increment without a product is of no slice, and moves nothing"
