"""What a quantised weight lost: as near to it as the rank permits, and to nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from edge_runtime.train import eight_bit  # noqa: E402 - after the check that torch is there
from edge_runtime.train.lost import leading  # noqa: E402 - as above

pytestmark = pytest.mark.torch


def error_of(d_out: int, d_in: int, seed: int = 0) -> Any:
    """What int8 loses of a random weight."""
    weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed))
    integers, scale = eight_bit.quantise(weight)
    return weight - integers.float() * scale.float()[:, None]


@given(d_out=st.integers(1, 40), d_in=st.integers(1, 40), seed=st.integers(0, 99), weighted=st.booleans())
def test_all_directions_are_the_whole_error(d_out: int, d_in: int, seed: int, *, weighted: bool) -> None:
    error = error_of(d_out, d_in, seed)
    sizes = torch.rand(d_in, generator=torch.Generator().manual_seed(seed)) + 0.1 if weighted else None
    a, b = leading(error, max(d_out, d_in), sizes)

    assert a.shape[0] == b.shape[1] == min(d_out, d_in)
    torch.testing.assert_close(b @ a, error, rtol=0, atol=1e-4 * float(error.abs().max()) + 1e-9)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_few_directions_hold_what_an_exact_decomposition_holds_to_within_a_twentieth(rank: int) -> None:
    error = error_of(128, 96)
    exact = torch.linalg.svdvals(error)[:rank].square().sum()
    a, b = leading(error, rank)
    left = (error - b @ a).square().sum()

    assert error.square().sum() - left >= 0.95 * exact


def test_directions_by_inputs_serve_the_outputs_better_and_the_weights_worse() -> None:
    error, draw = error_of(96, 128), torch.Generator().manual_seed(1)
    sizes = torch.logspace(-2, 1, 128)
    inputs = torch.randn(2000, 128, generator=draw) * sizes

    def left(sizes: Any) -> tuple[float, float]:
        a, b = leading(error, 8, sizes)
        remaining = error - b @ a
        return float((inputs @ remaining.T).square().sum()), float(remaining.square().sum())

    assert left(sizes)[0] < 0.6 * left(None)[0]
    assert left(sizes)[1] > left(None)[1]


def test_the_same_error_gives_the_same_directions_whatever_was_drawn_before() -> None:
    error = error_of(32, 48)
    first = leading(error, 4)
    torch.rand(3)
    for one, other in zip(first, leading(error, 4), strict=True):
        assert torch.equal(one, other)


def test_an_input_that_is_never_there_gives_no_infinite_direction() -> None:
    sizes = torch.ones(48)
    sizes[7] = 0
    a, b = leading(error_of(32, 48), 4, sizes)

    assert torch.isfinite(a).all()
    assert torch.isfinite(b).all()
