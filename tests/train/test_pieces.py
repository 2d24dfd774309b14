"""Norm, gate and rotation against what transformers computes, and their gradients against finite differences."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.models.llama import modeling_llama as llama  # noqa: E402 - after the check that it is there

from edge_runtime.train.pieces import gated_silu, rms_norm, rotate  # noqa: E402 - as above

pytestmark = pytest.mark.torch


def drawn(*shape: int, dtype: Any = torch.float64) -> Any:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def angles(tokens: int, width: int, dtype: Any) -> tuple[Any, Any]:
    turns = torch.rand(tokens, width // 2).to(dtype) * 6
    return turns.cos(), turns.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_bit_for_bit_that_of_transformers(dtype: Any) -> None:
    module = llama.LlamaRMSNorm(48, eps=1e-5).to(dtype)
    with torch.no_grad():
        module.weight.normal_()
    x = torch.randn(2, 9, 48).to(dtype)

    assert torch.equal(rms_norm(x, module.weight.detach(), 1e-5), module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_is_bit_for_bit_silu_times_up(dtype: Any) -> None:
    gate, up = torch.randn(9, 48).to(dtype), torch.randn(9, 48).to(dtype)

    assert torch.equal(gated_silu(gate, up), torch.nn.functional.silu(gate) * up)


def test_the_rotation_is_that_of_transformers() -> None:
    cos, sin = angles(9, 16, torch.float32)
    q = torch.randn(9, 3, 16)
    whole = [torch.cat((half, half), -1)[None] for half in (cos, sin)]
    expected, _ = llama.apply_rotary_pos_emb(q.transpose(0, 1)[None], q.transpose(0, 1)[None], *whole)

    torch.testing.assert_close(rotate(q, cos[:, None], sin[:, None]), expected[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


def test_gradients_are_exact_by_finite_differences() -> None:
    torch.manual_seed(0)
    cos, sin = angles(4, 6, torch.float64)
    weight = torch.randn(6, dtype=torch.float64)

    assert torch.autograd.gradcheck(gated_silu, (drawn(4, 6), drawn(4, 6)))
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos[:, None], sin[:, None]), (drawn(4, 2, 6),))
    # The norm sums in float32 whatever comes in, so float64 shows float32's noise.
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-5), (drawn(4, 6),), eps=1e-2, atol=1e-2, rtol=1e-2)


def test_gradients_in_bfloat16_point_where_those_of_float32_do() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(64, 48), torch.randn(64, 48)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        narrow = x.to(dtype).requires_grad_()
        y = gated_silu(rms_norm(narrow, torch.ones(48, dtype=dtype), 1e-5), narrow)
        found.append(torch.autograd.grad((y * weights.to(dtype)).sum(), narrow)[0].float().flatten())

    assert torch.cosine_similarity(*found, dim=0) > 0.9999
