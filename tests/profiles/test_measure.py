"""What is measured, and how much memory that may take."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles import measure
from profiles.measure import ACTIVATIONS_MOST, COPY_BYTES, SMOLLM2_SHAPES, WEIGHTS_MOST, bounded

SIZES = st.integers(1, 2**18)


@given(st.tuples(st.integers(1, 2**14), SIZES, SIZES))
def test_no_shape_asks_for_more_than_50_mb(shape: tuple[int, int, int]) -> None:
    tokens, d_in, d_out = bounded(shape)

    assert min(tokens, d_in, d_out) >= 1
    assert all(small <= asked for small, asked in zip((tokens, d_in, d_out), shape, strict=True))
    # fp32 and bf16 operands side by side, and the largest output.
    assert 6 * (d_in * d_out + tokens * (d_in + d_out)) <= 50e6
    assert 2 * COPY_BYTES <= 50e6


@given(st.tuples(st.integers(1, 512), st.integers(1, 900), st.integers(1, 900)))
def test_a_shape_that_fits_is_measured_as_it_is(shape: tuple[int, int, int]) -> None:
    assert math.prod(shape[1:]) <= WEIGHTS_MOST
    assert shape[0] * sum(shape[1:]) <= ACTIVATIONS_MOST
    assert bounded(shape) == shape


def test_the_default_shapes_are_measured_as_they_are() -> None:
    assert tuple(bounded(shape) for shape in SMOLLM2_SHAPES) == SMOLLM2_SHAPES


@pytest.mark.torch
def test_threads_that_wait_for_busy_cores_do_not_slow_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")

    def timed(_torch: object, _where: str, run: Callable[[], object]) -> float:
        run()
        return 10.0 if torch.get_num_threads() > 1 else 1.0

    monkeypatch.setattr(measure, "_timed", timed)
    monkeypatch.setattr(measure, "GEMM_SECONDS", 0.0)
    with measure.threads_of(torch, 2):
        rates = measure.gemm(torch, "cpu", [(4, 8, 16)], "here")
        opened = measure.int8_rate(torch, "cpu", (4, 8, 16), "float32")
        assert torch.get_num_threads() == 2, "as before"

    assert rates["gemm_fp32_gflops"].value == pytest.approx(2 * 4 * 8 * 16 / 1e9)
    assert opened == pytest.approx(8 * 16 / 1e9, rel=1e-3)
