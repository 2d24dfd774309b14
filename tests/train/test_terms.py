"""Terms beside the loss: their gradients are those of dense products, whatever the factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from edge_runtime.lora.adapter import Pair  # noqa: E402 - after the check that torch is there
from edge_runtime.train.terms import Term, proximal, push, tail  # noqa: E402 - as above
from tests.strategies import gaussian, laws  # noqa: E402 - as above

pytestmark = pytest.mark.torch

SCALING = 2.0
SHAPES = {"x": (9, 7), "y": (5, 11)}


def pairs(seed: int, rank: int = 3) -> dict[str, Pair]:
    return {name: gaussian(shape, rank, seed + at) for at, (name, shape) in enumerate(SHAPES.items())}


def live(found: Mapping[str, Pair]) -> dict[str, Any]:
    """As they live in a model: the scale is not folded in."""
    parameters = {}
    for name, pair in found.items():
        parameters[f"{name}.a"] = torch.nn.Parameter(torch.from_numpy(pair.a.copy()))
        parameters[f"{name}.b"] = torch.nn.Parameter(torch.from_numpy(pair.b / np.float32(SCALING)))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    return parameters


def added(term: Term, found: Mapping[str, Pair]) -> dict[str, np.ndarray]:
    """What the term adds to a gradient of ones."""
    parameters = live(found)
    term(parameters)
    return {name: parameter.grad.numpy() - 1.0 for name, parameter in parameters.items()}


def dense(found: Mapping[str, Pair], value: object) -> dict[str, np.ndarray]:
    """The gradient that autograd takes of a function of dense products, in float64."""
    parameters = {name: p.detach().double().requires_grad_() for name, p in live(found).items()}
    products = {name: SCALING * parameters[f"{name}.b"] @ parameters[f"{name}.a"] for name in found}
    value(products).backward()  # type: ignore[operator]
    return {name: parameter.grad.numpy() for name, parameter in parameters.items()}


def assert_equal(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    for name, expected in other.items():
        np.testing.assert_allclose(one[name], expected, atol=2e-5 * max(1.0, np.abs(expected).max()))


@laws
@given(st.integers(0, 1 << 20), st.floats(0.01, 3.0))
def test_the_proximal_gradient_is_that_of_the_distance_of_products(seed: int, strength: float) -> None:
    now, before = pairs(seed), pairs(seed + 7)

    def value(products: Mapping[str, Any]) -> Any:
        gaps = (products[name] - torch.from_numpy(pair.product().astype(np.float64)) for name, pair in before.items())
        return strength / 2 * sum((gap**2).sum() for gap in gaps)

    assert_equal(added(proximal(before, strength, SCALING), now), dense(now, value))


@laws
@given(st.integers(0, 1 << 20), st.floats(0.01, 3.0), st.integers(1, 4))
def test_the_gradient_of_a_push_is_that_of_the_inner_product(seed: int, strength: float, rank: int) -> None:
    now, direction = pairs(seed), pairs(seed + 7, rank)

    def value(products: Mapping[str, Any]) -> Any:
        return strength * sum(
            (products[name] * torch.from_numpy(pair.product().astype(np.float64))).sum()
            for name, pair in direction.items()
        )

    assert_equal(added(push(direction, strength, SCALING), now), dense(now, value))


def test_at_the_beginning_of_a_round_nothing_pulls() -> None:
    before = pairs(3)

    assert not any(values.any() for values in added(proximal(before, 5.0, SCALING), before).values())


def test_the_pull_does_not_depend_on_which_of_equal_factors_the_server_chose() -> None:
    """B Q, Q⁻¹ A: the same product, and the gradient follows its factor."""
    now, before = pairs(1), pairs(2)
    mix = np.random.default_rng(0).standard_normal((3, 3)) + 3 * np.eye(3)
    other = {
        name: Pair(np.linalg.solve(mix, pair.a).astype(np.float32), (pair.b @ mix).astype(np.float32))
        for name, pair in before.items()
    }

    assert_equal(added(proximal(other, 0.3, SCALING), now), added(proximal(before, 0.3, SCALING), now))


def test_a_layer_that_no_round_knows_of_is_not_pushed_and_one_without_a_gradient_is_an_error() -> None:
    found = added(push({"x": pairs(1)["x"]}, 1.0, SCALING), pairs(0))
    assert found["x.a"].any()
    assert not found["y.a"].any()
    parameters = live(pairs(0))
    parameters["x.a"].grad = None
    with pytest.raises(ValueError, match="found a parameter without one"):
        proximal(pairs(1), 1.0, SCALING)(parameters)


@laws
@given(st.integers(0, 1 << 20), st.sampled_from([0.4, 0.67, 0.99, 1.0]))
def test_the_tail_is_pulled_by_the_product_of_its_norms(seed: int, kept: float) -> None:
    found = pairs(seed, rank=4)
    parameters = {name: p.detach().double().requires_grad_() for name, p in live(found).items()}
    start, total = int(kept * 4), torch.zeros((), dtype=torch.float64)
    for name in found:
        of_a, of_b = parameters[f"{name}.a"][start:], SCALING * parameters[f"{name}.b"][:, start:]
        total = total + 0.3 * torch.sqrt((of_a**2).sum() + 1e-300) * torch.sqrt((of_b**2).sum() + 1e-300)
    total.backward()
    expected = {name: parameter.grad.numpy() for name, parameter in parameters.items()}

    assert_equal(added(tail(kept, 0.3, SCALING), found), expected)


def test_a_tail_of_zero_is_not_pulled() -> None:
    found = {"x": Pair(gaussian((9, 7), 4, 0).a, np.zeros((9, 4), np.float32))}
    assert all(not moved.any() for moved in added(tail(0.5, 1.0, SCALING), found).values())
