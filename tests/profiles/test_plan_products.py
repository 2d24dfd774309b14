"""The type in which a planned device multiplies."""

from __future__ import annotations

from dataclasses import replace

from profiles.plan import plan, smallest
from profiles.terms import Budgets, Overrides, Task
from tests.profiles.cards import ATTENTION, smollm2
from tests.profiles.measured import MEASURED

GIB = 2**30
TASK = Task(ATTENTION, max_rank=16, max_held=32, max_length=256, batch_size=4, steps=24)


def test_where_bfloat16_is_slow_products_are_float32_over_narrow_activations() -> None:
    slow = replace(MEASURED, bf16_is_fast=False, gemm_bf16_gflops=MEASURED.gemm_fp32_gflops / 2)

    found = plan(slow, smollm2(), TASK, Budgets(4 * GIB))

    assert (found.compute_dtype, found.product_dtype) == ("bf16", "fp32")
    assert "slower" in found.reasons["product_dtype"]
    asked = plan(slow, smollm2(), TASK, Budgets(4 * GIB), Overrides(product_dtype="bf16"))
    assert asked.product_dtype == "bf16"
    assert (asked.predicted_step_seconds or 0.0) > (found.predicted_step_seconds or 0.0) > 0
    assert plan(MEASURED, smollm2(), TASK, Budgets(4 * GIB)).product_dtype == "bf16"


def test_float32_products_give_way_where_their_casts_do_not_fit() -> None:
    slow = replace(MEASURED, bf16_is_fast=False, gemm_bf16_gflops=MEASURED.gemm_fp32_gflops / 2)
    least = smallest(slow, smollm2(), TASK).total

    tight = plan(slow, smollm2(), TASK, Budgets(least))

    assert tight.product_dtype == "bf16"
    assert "MiB more" in tight.reasons["product_dtype"]


def test_emulated_products_of_unknown_rate_are_not_on_offer() -> None:
    unknown = replace(MEASURED, bf16_is_fast=False, gemm_bf16_gflops=0.0)

    found = plan(unknown, smollm2(), TASK, Budgets(4 * GIB))

    assert (found.compute_dtype, found.product_dtype) == ("bf16", "fp32")
    assert (found.predicted_step_seconds or 0.0) > 0
