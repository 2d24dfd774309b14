"""The optimisers: what a step does, what their state says, and that it survives a file bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from edge_runtime.errors import ConfigError, RoundError  # noqa: E402 - after the check that torch is there
from edge_runtime.train import round_file  # noqa: E402 - as above
from edge_runtime.train.optimizer import (  # noqa: E402 - as above
    BETAS,
    EPSILON,
    LEAST_8BIT,
    OPTIMIZERS,
    Moments,
    build,
    clip,
    get,
    gradient_norms,
    set_rate,
)
from edge_runtime.train.resume import StepReport, capture, restore  # noqa: E402 - as above

pytestmark = pytest.mark.torch

NAMES = sorted(OPTIMIZERS)
SHAPES = {"x.a": (64, 70), "x.b": (80, 64), "y.a": (4, 70), "y.b": (80, 4)}
"""Two that are large enough for 8-bit moments, and two that are not."""

Parameters = dict[str, Any]


def parameters(seed: int = 0) -> Parameters:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in SHAPES.items()}


def step(found: Parameters, optimizer: Any, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in found.values():
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    optimizer.step()


def built(name: str, found: Parameters, ratio: float = 1.0) -> Any:
    return build(name, found, learning_rate=1e-2, weight_decay=0.01, lora_plus_ratio=ratio)


def reports(count: int) -> tuple[StepReport, ...]:
    return tuple(StepReport(at + 1, 9, 1.0 / (at + 3), 5, 1e-2, math.pi) for at in range(count))


def test_adamw_is_adamw() -> None:
    """Against the formulas of arXiv 1711.05101, in float64."""
    found = parameters()
    optimizer = built("adamw", found)
    expected = {name: parameter.detach().double().clone() for name, parameter in found.items()}
    first = {name: torch.zeros_like(values) for name, values in expected.items()}
    second = {name: torch.zeros_like(values) for name, values in expected.items()}
    for at in range(1, 6):
        step(found, optimizer, at)
        for name, parameter in found.items():
            assert parameter.grad is not None
            gradient = parameter.grad.double()
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * gradient
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * gradient**2
            scale = (second[name] / (1 - BETAS[1] ** at)).sqrt() + EPSILON
            expected[name] -= 1e-2 * (0.01 * expected[name] + first[name] / (1 - BETAS[0] ** at) / scale)
    for name, parameter in found.items():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-5)


def test_8_bit_moments_move_the_parameters_nearly_as_32_bit_ones_do() -> None:
    plain, small = parameters(), parameters()
    begun = parameters()
    one, other = built("adamw", plain), built("adamw_8bit", small)
    for at in range(10):
        step(plain, one, at)
        step(small, other, at)
    for name, parameter in plain.items():
        moved, also = ((found.detach() - begun[name].detach()).flatten() for found in (parameter, small[name]))
        assert torch.nn.functional.cosine_similarity(moved, also, dim=0) > 0.99
    held = {name: other.state[parameter]["state1"].dtype for name, parameter in small.items()}
    assert held == {"x.a": torch.uint8, "x.b": torch.uint8, "y.a": torch.float32, "y.b": torch.float32}


@pytest.mark.parametrize("name", NAMES)
def test_b_learns_at_the_ratio_of_lora_plus(name: str) -> None:
    """Adam's first step is the learning rate in each number, whatever the gradient."""
    found, before = parameters(), parameters()
    optimizer = build(name, found, learning_rate=1.0, weight_decay=0.0, lora_plus_ratio=16.0)
    set_rate(optimizer, 1e-3)
    step(found, optimizer, 1)
    for parameter_name, parameter in found.items():
        rate = 16e-3 if parameter_name.endswith(".b") else 1e-3
        moved = (parameter.detach() - before[parameter_name].detach()).abs()
        assert float(moved.median()) == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_through_a_file_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    found = parameters()
    optimizer = built(name, found, 4.0)
    for at in range(4):
        step(found, optimizer, at)
    state = capture(found, optimizer, reports(4), rng=bytes(torch.get_rng_state().numpy()), copy=False)
    round_file.write(tmp_path / "state", state, {})
    read, problem = round_file.read(tmp_path / "state")
    assert problem == ""
    assert read is not None
    assert (read.reports, read.position, read.rng) == (state.reports, 4, state.rng)

    other = parameters(seed=1)
    resumed = built(name, other, 4.0)
    restore(other, resumed, read)
    for parameter_name, parameter in found.items():
        left, right = optimizer.state[parameter], resumed.state[other[parameter_name]]
        assert left.keys() == right.keys()
        for entry in left:
            assert torch.equal(torch.as_tensor(left[entry]), torch.as_tensor(right[entry])), entry
    for at in range(4, 8):
        step(found, optimizer, at)
        step(other, resumed, at)
    assert all(torch.equal(parameter, other[parameter_name]) for parameter_name, parameter in found.items())


def test_tables_that_all_parameters_share_are_kept_and_restored_once(tmp_path: Path) -> None:
    found = parameters()
    optimizer = built("adamw_8bit", found)
    step(found, optimizer, 0)
    round_file.write(tmp_path / "state", capture(found, optimizer, reports(1)), {})
    read, _ = round_file.read(tmp_path / "state")
    assert read is not None
    restore(found, optimizer, read)

    assert optimizer.state[found["x.a"]]["qmap1"] is optimizer.state[found["x.b"]]["qmap1"]
    assert optimizer.state[found["x.a"]]["qmap1"] is not optimizer.state[found["x.b"]]["qmap2"]


def test_a_state_is_used_up_when_it_is_restored() -> None:
    """Or a small device would hold it beside the optimiser for the whole round."""
    found = parameters()
    optimizer = built("adamw", found)
    step(found, optimizer, 0)
    state = capture(found, optimizer, reports(1))
    restore(found, optimizer, state)

    assert (state.parameters, state.moments) == ({}, {})
    with pytest.raises(RoundError, match="start it afresh"):
        restore(found, optimizer, state)


def test_a_captured_state_does_not_follow_later_steps_and_a_view_does() -> None:
    found = parameters()
    optimizer = built("adamw", found)
    step(found, optimizer, 0)
    copied, view = capture(found, optimizer, reports(1)), capture(found, optimizer, reports(1), copy=False)
    before = copied.parameters["x.a"].copy()
    step(found, optimizer, 1)

    assert (copied.parameters["x.a"] == before).all()
    assert (view.parameters["x.a"] != before).any()


@pytest.mark.parametrize("name", NAMES)
def test_moments_go_into_an_optimiser_and_come_back(name: str) -> None:
    choice, draw = get(name), np.random.default_rng(0)
    for shape, tolerance in (((4, 70), 0.0), ((64, 70), 0.05 if name == "adamw_8bit" else 0.0)):
        first = draw.standard_normal(shape).astype(np.float32)
        moments = Moments(first, first**2, 7)
        found = choice.read(choice.write(moments))

        assert found.steps == 7
        assert np.abs(found.first - first).max() <= tolerance * np.abs(first).max()
        assert np.abs(found.second - first**2).max() <= tolerance * (first**2).max()
        assert found.second.min() >= 0
        assert (np.prod(shape) >= LEAST_8BIT) == (shape == (64, 70))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_as_moments_is_what_the_optimiser_itself_would_hold(name: str) -> None:
    """The same entries, types and shapes: the optimiser goes on with them."""
    found = parameters()
    optimizer = built(name, found)
    step(found, optimizer, 0)
    held, choice = capture(found, optimizer, reports(1)).moments, get(name)
    for entries in held.values():
        again = choice.write(choice.read(entries))
        assert {entry: (values.dtype, values.shape) for entry, values in again.items()} == {
            entry: (values.dtype, values.shape) for entry, values in entries.items()
        }


@pytest.mark.parametrize("most", [1e-3, 1.0, 1e6])
def test_clipping_is_that_of_torch(most: float) -> None:
    found, other = parameters(), parameters()
    for one in (found, other):
        for parameter in one.values():
            parameter.grad = parameter.detach().clone()
    norm = math.hypot(*gradient_norms(found).values())
    clip(found, norm, most)

    assert float(torch.nn.utils.clip_grad_norm_(other.values(), most)) == pytest.approx(norm, rel=1e-6)
    for name, parameter in found.items():
        torch.testing.assert_close(parameter.grad, other[name].grad)


def test_an_unknown_optimiser_is_told_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="unknown optimizer 'sgd'; expected one of: adamw, adamw_8bit"):
        built("sgd", parameters())
