"""The adapted layer against the same sum written out: values, gradients, and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from edge_runtime.train.eight_bit import Int8Linear  # noqa: E402 - after the check that torch is there
from edge_runtime.train.lora_linear import REGAINED, LoraLinear, frozen_product, opener_of  # noqa: E402 - as above

pytestmark = pytest.mark.torch

D_IN, D_OUT = 24, 40


def plain() -> Any:
    return torch.nn.Linear(D_IN, D_OUT).requires_grad_(requires_grad=False)


def int8() -> Any:
    return Int8Linear.of(plain())


def nf4() -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, D_OUT, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(torch.randn(D_OUT, 64), requires_grad=False, quant_type="nf4")
    return layer.to("cpu").requires_grad_(requires_grad=False)


def int8_that_regained() -> Any:
    """With two directions beside it of what it lost."""
    layer = int8()
    setattr(layer, REGAINED, (0.1 * torch.randn(2, D_IN), 0.1 * torch.randn(D_OUT, 2)))
    return layer


def adapted(base: Any, trained: int, held: int, dtype: Any = torch.float32) -> LoraLinear:
    layer = LoraLinear(base, trained=trained, held=held, scaling=2.0, held_dtype=torch.float32)
    with torch.no_grad():
        for factor in layer.parameters(recurse=False):
            factor.copy_(torch.randn_like(factor) * 0.1)
    for trainable in (layer.a, layer.b):
        if trainable is not None:
            trainable.requires_grad_()
    return layer.to(dtype) if dtype != torch.float32 else layer


def naive(layer: LoraLinear, x: Any) -> Any:
    weight, scale = opener_of(layer.base)(layer.base, x.dtype)
    y = x @ (weight if scale is None else weight * scale[:, None]).T
    y = y if layer.base.bias is None else y + layer.base.bias
    if hasattr(layer.base, REGAINED):
        down, up = layer.base.regained
        y = y + (x @ down.T) @ up.T
    for a, b in ((layer.a, layer.b), (layer.held_a, layer.held_b)):
        if a is not None and b is not None:
            y = y + 2.0 * (x @ a.T) @ b.T
    return y


@pytest.mark.parametrize("build", [plain, int8, nf4, int8_that_regained])
@pytest.mark.parametrize(("trained", "held"), [(3, 0), (3, 5), (0, 5)])
def test_values_and_gradients_are_those_of_the_sum_written_out(build: Any, trained: int, held: int) -> None:
    torch.manual_seed(0)
    layer = adapted(build(), trained, held)
    x = torch.randn(2, 7, layer.in_features, requires_grad=True)
    weights = torch.randn(2, 7, D_OUT)
    wanted = [x, *(factor for factor in (layer.a, layer.b) if factor is not None)]
    ours, theirs = layer(x), naive(layer, x)

    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad((ours * weights).sum(), wanted),
        torch.autograd.grad((theirs * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [plain, int8, nf4])
def test_products_of_a_wider_type_than_the_input_are_rounded_once(build: Any) -> None:
    torch.manual_seed(0)
    layer = adapted(build(), 3, 5)
    layer.base.product_dtype = torch.float32
    x = torch.randn(2, 7, layer.in_features).to(torch.bfloat16).requires_grad_()
    g = torch.randn(2, 7, D_OUT).to(torch.bfloat16)
    wide = x.detach().float().requires_grad_()

    ours, theirs = layer(x), naive(layer, wide)
    found = torch.autograd.grad(ours, [x, layer.a, layer.b], g)
    wanted = torch.autograd.grad(theirs, [wide, layer.a, layer.b], g.float())

    assert ours.dtype == found[0].dtype == torch.bfloat16
    assert torch.equal(ours, theirs.to(torch.bfloat16)) or (ours - theirs).abs().max() <= 2**-8 * theirs.abs().max()
    torch.testing.assert_close(found[0].float(), wanted[0], rtol=2**-7, atol=2**-7)
    # The factors' own gradients are never rounded to bfloat16.
    for one, other in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_frozen_product_keeps_nothing_but_passes_the_gradient_on() -> None:
    torch.manual_seed(0)
    layer, x = plain(), torch.randn(3, D_IN, requires_grad=True)
    kept: list[Any] = []

    def keep(saved: Any) -> Any:
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        y = frozen_product(layer, x)

    assert kept == []
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.ones(3, D_OUT) @ layer.weight)


def test_gradients_are_exact_by_finite_differences() -> None:
    torch.manual_seed(0)
    layer = adapted(plain(), 2, 3).double()
    x = torch.randn(3, D_IN, dtype=torch.float64, requires_grad=True)

    # The factors are perturbed in place, where the layer sees it.
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.a, layer.b))


def test_in_bfloat16_the_gradient_points_where_that_of_float32_does() -> None:
    torch.manual_seed(0)
    layer = adapted(plain(), 4, 4)
    x, weights = torch.randn(64, D_IN), torch.randn(64, D_OUT)
    found = [
        torch.autograd.grad((layer(x.to(dtype)) * weights.to(dtype)).sum(), [layer.a, layer.b])
        for dtype in (torch.float32, torch.bfloat16)
    ]

    for exact, rounded in zip(*found, strict=True):
        assert rounded.dtype == torch.float32
        assert torch.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.9999


@pytest.mark.parametrize(("trained", "inputs"), [(3, 1), (0, 0)])
def test_only_the_input_is_kept_and_only_where_something_is_trained(trained: int, inputs: int) -> None:
    layer = adapted(plain(), trained, 5)
    x = torch.randn(7, D_IN, requires_grad=True)
    parameters = {factor.data_ptr() for factor in layer.parameters()}
    kept: list[Any] = []

    def keep(tensor: Any) -> Any:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)

    assert [t.shape for t in kept if t.data_ptr() not in parameters] == [x.shape] * inputs


def test_a_layer_that_is_switched_off_is_the_base_alone() -> None:
    layer = adapted(plain(), 3, 2)
    layer.enabled = False
    x = torch.randn(7, D_IN)

    assert torch.equal(layer(x), layer.base(x))
