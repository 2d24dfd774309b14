"""8-bit layers: half a step of error at most, exact arithmetic after that, and nothing kept for the backward pass."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import BaseModelError
from tests.train.conftest import BuildTinyBase

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
pytest.importorskip("accelerate")
eight_bit = pytest.importorskip("edge_runtime.train.eight_bit")
convert = pytest.importorskip("edge_runtime.train.convert")
source = pytest.importorskip("edge_runtime.train.source")

OLD = transformers.__version__.startswith("4.")
TOKENS = torch.arange(40)[None]


def random(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(d_out: int, d_in: int, *, bias: bool = False, dtype: Any = torch.float32) -> Any:
    plain = torch.nn.Linear(d_in, d_out, bias=bias, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(random(d_out, d_in) * random(d_out, 1, seed=1).exp())
    return eight_bit.Int8Linear.of(plain)


def dequantised(found: Any, dtype: Any = torch.float64) -> Any:
    return found.weight.to(dtype) * found.scale.to(dtype)[:, None]


# --- quantising ----------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 40),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 1000),
)
def test_every_weight_is_off_by_half_a_step_at_most(
    rows: int, columns: int, exponent: int, dtype: str, seed: int
) -> None:
    weight = (random(rows, columns, seed=seed) * 10.0**exponent).to(getattr(torch, dtype))
    weight[0] = 0

    integers, scale = eight_bit.quantise(weight)

    assert (integers.dtype, scale.dtype) == (torch.int8, torch.bfloat16)
    assert int(integers.abs().max()) <= 127
    step = scale.double()[:, None]
    # Half a step, and the rounding of the quotient in float32.
    assert bool(((integers.double() * step - weight.double()).abs() <= step * 0.50001).all())
    assert bool((integers[0] == 0).all())


def test_a_row_uses_its_whole_range() -> None:
    integers, _ = eight_bit.quantise(random(50, 64) * random(50, 1, seed=1).exp())

    assert bool((integers.abs().amax(dim=1) >= 126).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    weight = random(3, 4)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        eight_bit.quantise(weight)


# --- computing ----------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 6e-3)])
def test_output_and_gradient_are_those_of_the_dequantised_weight(dtype: str, tolerance: float, bias: bool) -> None:
    found = layer(24, 48, bias=bias, dtype=getattr(torch, dtype))
    x = random(2, 5, 48, seed=2).to(getattr(torch, dtype)).requires_grad_()
    gradient = random(2, 5, 24, seed=3).to(x.dtype)
    weight = dequantised(found)

    y = found(x)
    y.backward(gradient)

    expected = torch.nn.functional.linear(x.detach().double(), weight, found.bias.double() if bias else None)
    assert y.dtype == x.grad.dtype == x.dtype
    assert float((y.detach().double() - expected).norm() / expected.norm()) < tolerance
    expected = gradient.double() @ weight
    assert float((x.grad.double() - expected).norm() / expected.norm()) < tolerance


def test_the_gradient_is_that_of_the_output() -> None:
    found = layer(5, 7, bias=True, dtype=torch.float64)

    assert torch.autograd.gradcheck(found, (random(3, 7).double().requires_grad_(),))


def test_nothing_is_kept_for_the_backward_pass_but_the_layer_itself() -> None:
    found, kept = layer(24, 48, bias=True), set()

    def keep(tensor: Any) -> Any:
        kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found(random(5, 48).requires_grad_())

    assert kept == {found.weight.data_ptr(), found.scale.data_ptr()}


def test_evaluation_and_training_agree() -> None:
    found, x = layer(24, 48), random(5, 48)

    assert torch.equal(found.train()(x), found.eval()(x))


def test_another_precision_of_the_model_leaves_the_weights_as_they_are() -> None:
    found = layer(24, 48)
    before = dequantised(found)

    for dtype in (torch.bfloat16, torch.float32):
        found.to(dtype)

        assert found.weight.dtype == torch.int8
        assert torch.equal(dequantised(found), before)


# --- loading ----------------------------------------


def int8(folder: Path, target: Path) -> Path:
    target.mkdir()
    convert.convert(source.resolve(str(folder)), target, "int8")
    return target


def widened(folder: Path, target: Path) -> Any:
    """What transformers loads from a folder of the same weights, dequantised beforehand."""
    target.mkdir()
    shutil.copy(folder / "tokenizer.json", target)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = safetensors_torch.load_file(folder / "model.safetensors")
    plain = {
        name: tensor.float() * tensors[name.replace(".weight", ".scale")].float()[:, None]
        if tensor.dtype == torch.int8
        else tensor.float()
        for name, tensor in tensors.items()
        if not name.endswith(".scale")
    }
    safetensors_torch.save_file(plain, target / "model.safetensors", metadata={"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)


def logits_of(model: Any) -> Any:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_model_is_the_one_that_transformers_would_load(
    build_tiny_base: BuildTinyBase, tmp_path: Path, tied: bool
) -> None:
    """Buffers above all: rotary frequencies are in no file, and a model made without memory has none."""
    folder = int8(build_tiny_base(tied=tied), tmp_path / "int8")
    expected = widened(folder, tmp_path / "wide")

    found = eight_bit.load_model(folder, torch.float32, "cpu")

    torch.testing.assert_close(logits_of(found), logits_of(expected), rtol=0, atol=1e-5)
    buffers = {name: buffer for name, buffer in found.named_buffers() if not name.endswith(".scale")}
    assert buffers.keys() == dict(expected.named_buffers()).keys() != set()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in expected.named_buffers())
    assert not any(tensor.is_meta for tensor in (*found.parameters(), *found.buffers()))
    head, embedding = found.get_output_embeddings(), found.get_input_embeddings()
    assert type(head) is torch.nn.Linear
    assert (head.weight.data_ptr() == embedding.weight.data_ptr()) is tied
    kinds = [type(module).__name__ for module in found.modules()]
    assert kinds.count("Int8Linear") == 21
    assert found.generation_config is not None


def test_layers_with_biases_and_scaled_rotary_embeddings_are_loaded(tiny_base: Path, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, mlp_bias=True, initializer_range=0.1, tie_word_embeddings=True,
        rope_scaling={"rope_type": "linear", "factor": 4.0},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.copy_(random(*parameter.shape))
    model.save_pretrained(tmp_path / "biased")
    shutil.copy(tiny_base / "tokenizer.json", tmp_path / "biased")
    folder = int8(tmp_path / "biased", tmp_path / "int8")

    found = eight_bit.load_model(folder, torch.float32, "cpu")

    torch.testing.assert_close(logits_of(found), logits_of(widened(folder, tmp_path / "wide")), rtol=0, atol=1e-5)


def test_a_model_in_bfloat16_computes_close_to_float32(tiny_base: Path, tmp_path: Path) -> None:
    folder = int8(tiny_base, tmp_path / "int8")

    narrow = logits_of(eight_bit.load_model(folder, torch.bfloat16, "cpu"))

    wide = logits_of(eight_bit.load_model(folder, torch.float32, "cpu"))
    assert narrow.dtype == torch.bfloat16
    assert float((narrow.float() - wide).norm() / wide.norm()) < 0.03


def test_transformers_alone_does_not_take_the_integers_for_weights_unnoticed(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Version 4 says that it knows no such method, and fails; version 5 says so, and lists the scales as left over."""
    folder = int8(tiny_base, tmp_path / "int8")
    refused = pytest.raises(RuntimeError, match="floating point") if OLD else contextlib.nullcontext()

    with refused:
        transformers.AutoModelForCausalLM.from_pretrained(folder)

    assert "edge-runtime-int8" in caplog.text


UP = "model.layers.0.mlp.up_proj"


def lose_a_weight(tensors: dict[str, Any]) -> None:
    del tensors[f"{UP}.weight"]


def add_a_tensor(tensors: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.side_proj.weight"] = torch.zeros(2, 2)


def cut_a_weight(tensors: dict[str, Any]) -> None:
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"][:-1].contiguous()


def lose_a_scale(tensors: dict[str, Any]) -> None:
    del tensors[f"{UP}.scale"]


def scale_a_norm(tensors: dict[str, Any]) -> None:
    tensors["model.norm.scale"] = torch.ones(64)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_weight, rf"found none named {UP}\.weight"),
        (add_a_tensor, r"found also '.*side_proj\.weight'"),
        (cut_a_weight, rf"expected '{UP}\.weight' .* as \(128, 64\), torch\.int8; found \(127, 64\)"),
        (lose_a_scale, rf"expected '{UP}\.weight' .* as \(128, 64\), torch\.\w*float\w*; found .*int8"),
        (scale_a_norm, r"expected a linear layer 'model\.norm'"),
    ],
)
def test_tensors_that_do_not_make_the_model_are_named(
    tiny_base: Path, tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    folder = int8(tiny_base, tmp_path / "int8")
    tensors = {
        name: tensor.clone() for name, tensor in safetensors_torch.load_file(folder / "model.safetensors").items()
    }
    damage(tensors)
    safetensors_torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(BaseModelError, match=message):
        eight_bit.load_model(folder, torch.float32, "cpu")
