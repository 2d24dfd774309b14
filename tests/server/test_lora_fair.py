"""LoRA-FAIR: both variants reach what they say they minimise, and hold on to what devices know."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError
from server import aggregators
from server.aggregators.lora_fair import cosine, ridge
from tests.server.merging import (
    LAYER,
    SHAPES,
    dense,
    learnt_state,
    mean,
    naive_mean_of_factors,
    naive_svd,
    updates_from,
)

D_OUT, D_IN = SHAPES[LAYER]
strengths = st.sampled_from([1e-3, 0.01, 0.3])


def drawn(seed: int, rank: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Some a and b, and a W* that is near to their product."""
    draw = np.random.default_rng(seed)
    a, b = draw.standard_normal((rank, D_IN)), draw.standard_normal((D_OUT, rank))
    return a, b, b @ a + 0.5 * draw.standard_normal((D_OUT, D_IN))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), strength=strengths)
def test_the_ridge_is_where_its_gradient_is_zero(seed: int, strength: float) -> None:
    a, b, wanted = drawn(seed)
    moved = ridge((wanted - b @ a) @ a.T, a @ a.T, strength)
    weight = strength * np.mean(np.sum(a * a, axis=1))
    assert np.allclose((wanted - (b + moved) @ a) @ a.T, weight * moved, atol=1e-9)


def objective(moved: np.ndarray, a: np.ndarray, b: np.ndarray, wanted: np.ndarray, strength: float) -> float:
    found = (b + moved) @ a
    similar = np.sum(found * wanted) / np.linalg.norm(found) / np.linalg.norm(wanted)
    return float(1 - similar + strength * np.linalg.norm(moved))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), strength=strengths)
def test_no_step_from_where_the_cosine_variant_ends_leads_further_down(seed: int, strength: float) -> None:
    a, b, wanted = drawn(seed)
    moved = cosine(wanted @ a.T, a @ a.T, b, float(np.linalg.norm(wanted)), strength)
    reached = objective(moved, a, b, wanted, strength)
    assert reached <= objective(np.zeros_like(b), a, b, wanted, strength) + 1e-12
    draw = np.random.default_rng(seed + 1)
    for size in (1e-3, 1e-2, 0.1):
        step = size * draw.standard_normal(b.shape)
        assert objective(moved + step, a, b, wanted, strength) > reached - 1e-5


@pytest.mark.parametrize("variant", ["ridge", "cosine"])
def test_it_lies_between_the_mean_of_factors_and_the_mean_of_products(variant: str) -> None:
    state, method = learnt_state(4), aggregators.build("lora_fair", variant=variant, strength=1e-3)
    updates = updates_from(state, method, [4] * 3, size=0.3)
    merged = method.combine(state, updates).state.adapter[LAYER]
    wanted, plain = naive_svd(state, updates, LAYER), naive_mean_of_factors(state, updates, LAYER)
    assert np.allclose(merged.a, mean(updates, LAYER, lambda u: u.trained[LAYER].a.astype(float)), atol=1e-6)

    def apart(found: np.ndarray) -> float:
        """The sine of the angle to the mean of products, which both variants make smaller."""
        cos = np.sum(found * wanted) / np.linalg.norm(found) / np.linalg.norm(wanted)
        return float(np.sqrt(1 - cos**2))

    found = merged.b.astype(float) @ merged.a.astype(float)
    assert apart(found) < 0.95 * apart(plain)
    assert np.linalg.norm(found - dense(state.adapter)[LAYER]) > 0


def test_a_product_of_zero_has_no_direction_to_follow() -> None:
    zero = np.zeros((D_OUT, 3))
    assert not cosine(zero, np.eye(3), zero, 0.0, 0.01).any()
    assert not ridge(zero, np.zeros((3, 3)), 0.01).any()


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"variant": "sgd"}, "variant must be one of ridge, cosine; found 'sgd'"),
        ({"strength": 0.0}, "strength must be"),
    ],
)
def test_bad_parameters_are_refused(parameters: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        aggregators.build("lora_fair", **parameters)
