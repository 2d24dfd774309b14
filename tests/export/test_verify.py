"""The comparison itself: what it reports, and that it leaves the models as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from edge_runtime.train.base import load, prepare  # noqa: E402 - after the check that torch is there
from edge_runtime.train.live import attach, load_adapter, read_all  # noqa: E402 - as above
from export.attached import attached  # noqa: E402 - as above
from export.float32 import in_float32  # noqa: E402 - as above
from export.verify import logits, reference_of  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above

pytestmark = pytest.mark.torch

PROMPTS = ((3, 4, 5), (6, 7))


def test_prompts_do_not_see_each_other_and_the_mode_is_restored(tiny_base: Path) -> None:
    model = tiny.plain_model(tiny_base).train()
    together = logits(model, PROMPTS)

    np.testing.assert_array_equal(together, np.concatenate([logits(model, [prompt]) for prompt in PROMPTS]))
    assert together.shape == (5, tiny.VOCABULARY)
    assert model.training


def test_a_model_that_trains_in_bfloat16_is_compared_in_float32_and_keeps_its_bits(
    tiny_base: Path, tmp_path: Path
) -> None:
    prepared = prepare(str(tiny_base), precision="nf4", cache=tmp_path)
    adapter = tiny.random_adapter(tiny.MIXED)
    narrow = attach(load(prepared, compute_dtype="bf16").model, tiny.MIXED, scaling=2.0, held_dtype=torch.bfloat16)
    load_adapter(narrow, adapter)
    # What bfloat16 keeps of the held directions is what leaves, and what must be compared.
    wide = attach(load(prepared, compute_dtype="fp32").model, tiny.MIXED, scaling=2.0)
    load_adapter(wide, read_all(narrow))
    before = {name: tensor.clone() for name, tensor in narrow.model.state_dict().items()}
    rounded = logits(narrow.model, PROMPTS)
    (tmp_path / "narrow").mkdir()
    (tmp_path / "wide").mkdir()
    found = reference_of(narrow, PROMPTS, tmp_path / "narrow", count=2)
    expected = reference_of(wide, PROMPTS, tmp_path / "wide", count=2)

    assert found.rows == expected.rows
    for one, other, prompt in zip(found.live, expected.live, PROMPTS, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
        assert one.shape == (len(prompt) + 2, tiny.VOCABULARY)
    assert np.abs(np.concatenate([rows[:-2] for rows in found.live]) - rounded).max() > 1e-3
    assert found.effect == pytest.approx(expected.effect, abs=1e-5)
    np.testing.assert_array_equal(logits(narrow.model, PROMPTS), rounded)
    for name, tensor in narrow.model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_directions_trained_and_held_round_as_one_product_does_and_only_while_they_are_compared(
    tiny_base: Path, tmp_path: Path
) -> None:
    """Whoever reads the adapter has one product, and float32 tells the sum of two from it."""
    prepared = prepare(str(tiny_base), precision="nf4", cache=tmp_path)
    apart = attach(load(prepared, compute_dtype="fp32").model, tiny.MIXED, scaling=2.0)
    load_adapter(apart, tiny.random_adapter(tiny.MIXED), {tiny.layer(1, "q_proj"): (5, 0, 3, 1)})
    together = attached(load(prepared, compute_dtype="fp32").model, read_all(apart), scaling=2.0)
    (tmp_path / "apart").mkdir()
    (tmp_path / "together").mkdir()
    before = logits(apart.model, PROMPTS)
    found = reference_of(apart, PROMPTS, tmp_path / "apart", count=2)
    expected = reference_of(together, PROMPTS, tmp_path / "together", count=2)

    for one, other in zip(found.live, expected.live, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(logits(apart.model, PROMPTS), before)
    assert (before != logits(together.model, PROMPTS)).any()


def test_a_tied_head_stays_tied_and_is_not_widened_as_a_whole(tiny_base: Path) -> None:
    model = tiny.plain_model(tiny_base).to(torch.bfloat16)
    with in_float32(model):
        found = logits(model, PROMPTS)
        assert model.lm_head.weight.dtype == torch.bfloat16

    assert model.lm_head.weight is model.model.embed_tokens.weight
    np.testing.assert_allclose(found, logits(model.float(), PROMPTS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
def test_a_bfloat16_model_in_float32_computes_what_a_float32_model_of_the_same_weights_computes(
    tiny_base: Path, tmp_path: Path, precision: str
) -> None:
    prepared = prepare(str(tiny_base), precision=precision, cache=tmp_path)
    narrow = load(prepared, compute_dtype="bf16").model
    wide = narrow.float() if precision == "bf16" else load(prepared, compute_dtype="fp32").model
    narrow = load(prepared, compute_dtype="bf16").model
    with in_float32(narrow):
        found = logits(narrow, PROMPTS)

    np.testing.assert_allclose(found, logits(wide, PROMPTS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["nf4", "int8", "fp16"])
def test_products_of_another_type_are_compared_in_float32_too(tiny_base: Path, tmp_path: Path, precision: str) -> None:
    prepared = prepare(str(tiny_base), precision=precision, cache=tmp_path)
    wide = load(prepared, compute_dtype="fp32").model
    other = load(prepared, compute_dtype="fp32", product_dtype="bf16").model
    before = {layer.product_dtype for layer in other.modules() if hasattr(layer, "product_dtype")}
    with in_float32(other):
        found = logits(other, PROMPTS)

    np.testing.assert_allclose(found, logits(wide, PROMPTS), rtol=0, atol=1e-5)
    assert before == {torch.bfloat16}
    assert {layer.product_dtype for layer in other.modules() if hasattr(layer, "product_dtype")} == before


def test_an_error_within_leaves_the_weights_as_they_were(tiny_base: Path) -> None:
    model = tiny.plain_model(tiny_base).to(torch.bfloat16)
    with pytest.raises(IndexError), in_float32(model):
        logits(model, [(10**6,)])

    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
