"""What the CPU computes, a card computes too.

Each law runs on the CPU as well: there it compares like with like, and shows that the test itself is sound.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from torch.nn import functional  # noqa: E402 - after the check that torch is there

from edge_runtime.train import evaluating, loop, loss  # noqa: E402 - as above
from edge_runtime.train.attention import packed_attention  # noqa: E402 - as above
from edge_runtime.train.base import load, prepare  # noqa: E402 - as above
from edge_runtime.train.families import get  # noqa: E402 - as above
from edge_runtime.train.footprint import Footprint  # noqa: E402 - as above
from edge_runtime.train.live import LiveModel  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above

pytestmark = pytest.mark.torch

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")],
)
DEVICES = ["cpu", CUDA]
EXAMPLES = tiny.examples(8)
TASK = loop.LocalTask(steps=3, learning_rate=5e-3, micro_batch=2, gradient_accumulation_steps=2, seed=3)

Compute = Literal["bf16", "fp32"]
# (precision of the base, of the arithmetic): least cosine of gradients, greatest relative difference of losses.
TOLERANCES: dict[tuple[str, Compute], tuple[float, float]] = {
    ("fp32", "fp32"): (0.9999, 1e-4),
    ("nf4", "fp32"): (0.9999, 1e-4),
    ("nf4", "bf16"): (0.99, 2e-2),
    ("bf16", "bf16"): (0.99, 2e-2),
    ("int8", "bf16"): (0.99, 2e-2),
}
GRADED = pytest.mark.parametrize(("precision", "compute"), TOLERANCES, ids="-".join)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def live_on(device: str, base: Path, cache: Path, precision: str, compute: Compute) -> LiveModel:
    """The tiny base with an adapter that was learnt before."""
    prepared = prepare(str(base), precision=precision, cache=cache, say=lambda _: None)
    live = get("lora").attach(load(prepared, compute_dtype=compute, device=device).model, tiny.MIXED, scaling=2.0)
    get("lora").load(live, tiny.random_adapter(tiny.MIXED, size=0.1))
    return live


def gradients_of(live: LiveModel) -> dict[str, Any]:
    """Gradients of the examples' summed loss as packed rows give them, by parameter, in float32 on the CPU."""
    kept: dict[str, Any] = {}
    parameters = get("lora").trainable(live)
    # The norm is far below the limit of clipping, and the step too small to see.
    for name, parameter in parameters.items():
        parameter.register_hook(lambda gradient, name=name: kept.update({name: gradient.detach().float().cpu()}))
    task = loop.LocalTask(steps=1, learning_rate=1e-9, micro_batch=len(EXAMPLES), max_grad_norm=1e9)
    loop.train_round(live, EXAMPLES, task)
    assert kept.keys() == parameters.keys()
    return kept


@GRADED
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_has_the_loss_and_the_gradient_that_the_cpu_finds(
    device: str, precision: str, compute: Compute, tiny_base: Path, cache: Path
) -> None:
    cosine, relative = TOLERANCES[precision, compute]
    there, here = (live_on(where, tiny_base, cache, precision, compute) for where in (device, "cpu"))
    found, expected = gradients_of(there), gradients_of(here)

    assert evaluating.evaluate(there, EXAMPLES).loss == pytest.approx(
        evaluating.evaluate(here, EXAMPLES).loss, rel=relative
    )
    for name, exact in expected.items():
        assert torch.cosine_similarity(found[name].flatten(), exact.flatten(), dim=0) > cosine, name


@GRADED
@pytest.mark.parametrize("device", DEVICES)
def test_training_after_an_evaluation_is_training_without_one(
    device: str, precision: str, compute: Compute, tiny_base: Path, cache: Path
) -> None:
    """Kernels for inference that cut the backward pass would show here."""
    losses = []
    for evaluated in (False, True):
        live = live_on(device, tiny_base, cache, precision, compute)
        if evaluated:
            evaluating.evaluate(live, EXAMPLES)
        reports = loop.train_round(live, EXAMPLES, TASK).state.reports
        assert all(report.gradient_norm > 0 for report in reports)
        losses.append([report.loss for report in reports])

    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_checkpointing_changes_memory_and_not_the_loss(
    device: str, checkpointing: bool, tiny_base: Path, cache: Path
) -> None:
    task = loop.LocalTask(steps=3, learning_rate=5e-3, micro_batch=2, gradient_checkpointing=checkpointing)
    found, expected = (
        loop.train_round(live_on(device, tiny_base, cache, "nf4", "bf16"), EXAMPLES, asked).state.reports
        for asked in (task, loop.LocalTask(steps=3, learning_rate=5e-3, micro_batch=2))
    )

    assert [at.loss for at in found] == pytest.approx([at.loss for at in expected], rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def test_each_packed_example_attends_to_itself_alone(device: str, dtype: str) -> None:
    torch.manual_seed(0)
    lengths, tolerance = (5, 1, 30, 33, 17, 130), 1e-4 if dtype == "float32" else 3e-2
    q, k, v = (
        torch.randn(heads, sum(lengths), 64).to(device, getattr(torch, dtype)).requires_grad_() for heads in (6, 2, 2)
    )
    together = packed_attention(q, k, v, lengths, 0.125)
    weights = torch.randn(together.shape).to(together)
    found = torch.autograd.grad((together * weights).sum(), (q, k, v))
    parts = zip(*(x.float().split(lengths, dim=1) for x in (q, k, v)), strict=True)
    alone = torch.cat(
        [
            functional.scaled_dot_product_attention(
                one, other.repeat_interleave(3, 0), values.repeat_interleave(3, 0), is_causal=True, scale=0.125
            )
            for one, other, values in parts
        ],
        dim=1,
    )
    expected = torch.autograd.grad((alone * weights).sum(), (q, k, v))

    torch.testing.assert_close(together.float(), alone, rtol=tolerance, atol=tolerance)
    for one, other in zip(found, expected, strict=True):
        assert torch.cosine_similarity(one.float().flatten(), other.float().flatten(), dim=0) > 0.999


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_loss_of_a_frozen_head_is_that_of_the_whole_logits(device: str, dtype: str) -> None:
    """On a card this is Liger's kernel where it is installed."""
    torch.manual_seed(0)
    exact = getattr(torch, dtype)
    hidden = torch.randn(70, 64).to(device, exact).requires_grad_()
    weight, labels = (torch.randn(1000, 64) / 8).to(device, exact), torch.randint(0, 1000, (70,)).to(device)
    expected = functional.cross_entropy(functional.linear(hidden.float(), weight.float()), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(expected, hidden)
    ours = loss.chunked_cross_entropy(hidden, weight, labels)
    (found,) = torch.autograd.grad(ours / 7, hidden)

    torch.testing.assert_close(ours.float(), expected, rtol=1e-4 if dtype == "float32" else 1e-2, atol=0)
    assert torch.cosine_similarity((7 * found).float().flatten(), gradient.float().flatten(), dim=0) > 0.999


@pytest.mark.parametrize("device", [CUDA])
def test_ligers_kernel_computes_what_ours_does(device: str) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    torch.manual_seed(0)
    hidden = torch.randn(70, 64, device=device, requires_grad=True)
    weight, labels = torch.randn(1000, 64, device=device) / 8, torch.randint(0, 1000, (70,), device=device)
    assert loss.FUSED[device]() is not None
    (theirs, ours) = (loss.chunked_cross_entropy(hidden, weight, labels, chunk=chunk) for chunk in (None, 16))

    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=0)
    for one, other in zip(torch.autograd.grad(theirs, hidden), torch.autograd.grad(ours, hidden), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("device", [CUDA])
def test_what_torch_reserves_on_the_card_is_measured(device: str, tiny_base: Path, cache: Path) -> None:
    footprint = Footprint()
    footprint.begin()
    live = live_on(device, tiny_base, cache, "nf4", "bf16")
    loop.train_round(live, EXAMPLES, TASK)
    footprint.sample()
    reserved = torch.cuda.max_memory_reserved()

    assert 0 < torch.cuda.max_memory_allocated() <= reserved
    assert footprint.since_begin("gpu") >= reserved
