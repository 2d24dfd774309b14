"""A base is converted once, trusted only after a look, and trainable when it is loaded."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import BaseModelError, UnknownBaseError
from tests.train import tiny

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes")
base = pytest.importorskip("edge_runtime.train.base")
prepared = pytest.importorskip("edge_runtime.train.prepared")


def prepare(spec: Path, cache: Path, precision: str = "nf4") -> tuple[Any, list[str]]:
    said: list[str] = []
    return base.prepare(str(spec), precision=precision, cache=cache, say=said.append), said


def logits_of(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


@pytest.fixture(scope="module")
def nf4(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny base prepared as NF4; read it, never write into it."""
    return prepare(tiny_base, tmp_path_factory.mktemp("cache"))[0]


# --- preparing ----------------------------------------


def test_a_base_is_converted_once(tiny_base: Path, tmp_path: Path) -> None:
    first, said_first = prepare(tiny_base, tmp_path)
    second, said_second = prepare(tiny_base, tmp_path)

    assert first == second
    assert first.folder.parent == tmp_path / "bases"
    assert first.folder.name == f"{first.fingerprint[:16]}-nf4"
    assert [len(said_first), len(said_second)] == [1, 0]
    assert not list((tmp_path / "bases").glob("*.part"))


def test_every_precision_has_the_fingerprint_of_the_base(tiny_base: Path, tmp_path: Path) -> None:
    found = [prepare(tiny_base, tmp_path, precision)[0] for precision in ("nf4", "int8", "bf16", "fp32")]

    assert len({one.fingerprint for one in found}) == 1
    assert len({one.folder for one in found}) == 4


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))


def lose_a_file(folder: Path) -> None:
    (folder / "config.json").unlink()


def garble_the_manifest(folder: Path) -> None:
    (folder / "base.json").write_text('{"fingerprint": ', encoding="utf-8")


def lose_the_manifest(folder: Path) -> None:
    (folder / "base.json").unlink()


def claim_another_base(folder: Path) -> None:
    path = folder / "base.json"
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"fingerprint": "0" * 64}), encoding="utf-8"
    )


DAMAGES = [truncate, flip_a_bit, lose_a_file, garble_the_manifest, lose_the_manifest, claim_another_base]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_anew_and_said(tiny_base: Path, tmp_path: Path, nf4: Any, damage: Any) -> None:
    folder = tmp_path / "bases" / nf4.folder.name
    shutil.copytree(nf4.folder, folder)
    damage(folder)

    again, said = prepare(tiny_base, tmp_path)

    assert len(said) == 2
    assert "damaged and is converted again: expected" in said[0]
    assert again.folder == folder
    assert prepared.check(folder).files == prepared.read_manifest(nf4.folder).files
    assert prepare(tiny_base, tmp_path)[1] == []


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_a_prepared_folder_can_be_carried_to_another_device(tiny_base: Path, tmp_path: Path, precision: str) -> None:
    made, _ = prepare(tiny_base, tmp_path / "first", precision)
    carried = shutil.copytree(made.folder, tmp_path / "carried")

    found, said = prepare(carried, tmp_path / "cache", precision)

    assert (found.folder, found.fingerprint, found.label) == (carried, made.fingerprint, made.label)
    assert said == []
    assert not (tmp_path / "cache").exists()
    assert torch.equal(*(logits_of(base.load(one, compute_dtype="fp32").model) for one in (made, found)))


def test_a_device_too_small_to_convert_may_use_what_is_converted(tiny_base: Path, tmp_path: Path) -> None:
    def prepare_within(memory: int) -> Any:
        return base.prepare(str(tiny_base), precision="int8", cache=tmp_path, memory_bytes=memory)

    with pytest.raises(BaseModelError, match=r"expected \d+ MiB of memory to convert .*; found 100 MiB"):
        prepare_within(100 << 20)
    assert not [path for path in (tmp_path / "bases").glob("*-int8*") if path.is_dir()]

    made = prepare_within(1 << 40)
    assert prepare_within(100 << 20) == made


def test_a_carried_folder_that_is_damaged_or_of_another_precision_is_an_error(tmp_path: Path, nf4: Any) -> None:
    carried = shutil.copytree(nf4.folder, tmp_path / "carried")

    with pytest.raises(BaseModelError, match=r"expected a base prepared as bf16; found .* prepared as nf4"):
        prepare(carried, tmp_path, "bf16")
    flip_a_bit(carried)
    with pytest.raises(BaseModelError, match=r"model\.safetensors to have digest"):
        prepare(carried, tmp_path)


def test_many_may_prepare_at_once(tiny_base: Path, tmp_path: Path) -> None:
    """The lock holds between open files, so threads stand for processes here."""
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: prepare(tiny_base, tmp_path), range(4)))

    said = [sentence for _, sentences in results for sentence in sentences]
    assert len({found.folder for found, _ in results}) == 1
    assert sum(sentence.startswith("converting") for sentence in said) == 1
    assert sum("waiting" in sentence for sentence in said) <= 3
    assert prepared.check(results[0][0].folder)


def test_the_remains_of_a_killed_conversion_do_no_harm(tiny_base: Path, tmp_path: Path, nf4: Any) -> None:
    remains = tmp_path / "bases" / f"{nf4.folder.name}.part"
    remains.mkdir(parents=True)
    (remains / "model-00007.safetensors").write_bytes(b"half")

    found, _ = prepare(tiny_base, tmp_path)

    assert set(prepared.check(found.folder).files) == set(prepared.read_manifest(nf4.folder).files)
    assert not remains.exists()


def test_a_conversion_that_fails_leaves_nothing_behind(tiny_base: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_base, tmp_path / "broken")
    (broken / "tokenizer.json").unlink()

    with pytest.raises(BaseModelError, match="expected a tokenizer"):
        prepare(broken, tmp_path / "cache")

    assert not [path for path in (tmp_path / "cache" / "bases").glob("*-nf4*") if path.is_dir()]


def test_what_is_no_base_or_no_precision_is_an_error(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownBaseError):
        prepare(tmp_path / "nothing", tmp_path)
    with pytest.raises(BaseModelError, match="unknown precision 'int3'"):
        prepare(tiny_base, tmp_path, "int3")


# --- loading ----------------------------------------


@pytest.fixture(scope="module")
def int8(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny base prepared as int8; read it, never write into it."""
    return prepare(tiny_base, tmp_path_factory.mktemp("cache"), "int8")[0]


@pytest.fixture(params=["nf4", "int8"])
def quantised(request: pytest.FixtureRequest) -> Any:
    """Each of the bases with quantised layers."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(("compute", "dtype"), [("bf16", "bfloat16"), ("fp32", "float32")])
def test_a_loaded_base_is_frozen_and_computes_as_planned(quantised: Any, compute: str, dtype: str) -> None:
    loaded = base.load(quantised, compute_dtype=compute)

    expected = getattr(torch, dtype)
    packed = {"nf4": torch.uint8, "int8": torch.int8}[quantised.precision]
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {packed, expected}
    assert loaded.model.training
    assert loaded.model.config.use_cache is False
    assert logits_of(loaded.model).dtype == expected
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("def f():", add_special_tokens=False)) == "def f():"
    assert loaded.prepared == quantised


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16", "fp16"])
def test_products_may_be_wider_than_activations(tiny_base: Path, tmp_path: Path, precision: str) -> None:
    found = prepare(tiny_base, tmp_path, precision)[0]
    narrow = base.load(found, compute_dtype="bf16").model
    model = base.load(found, compute_dtype="bf16", product_dtype="fp32").model
    ids = torch.arange(12)[None]
    lean = pytest.importorskip("edge_runtime.train.lean")
    with torch.no_grad(), lean.lean(narrow), lean.lean(model):
        ours, theirs = model(input_ids=ids).logits, narrow(input_ids=ids).logits

    assert ours.dtype == torch.bfloat16
    assert {layer.product_dtype for layer in model.modules() if hasattr(layer, "product_dtype")} == {torch.float32}
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_half_weights_stay_half_and_are_opened_for_each_product(tiny_base: Path, tmp_path: Path) -> None:
    found = prepare(tiny_base, tmp_path, "fp16")[0]
    model = base.load(found, compute_dtype="fp32").model
    exact = base.load(prepare(tiny_base, tmp_path, "fp32")[0], compute_dtype="fp32").model
    ids = torch.arange(12)[None]

    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype == torch.float16
    assert model.lm_head.weight.dtype == torch.float32
    torch.testing.assert_close(model(input_ids=ids).logits, exact(input_ids=ids).logits, rtol=1e-2, atol=1e-2)


def test_weights_that_half_cannot_hold_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    large = shutil.copytree(tiny_base, tmp_path / "large")
    path = large / "model.safetensors"
    tensors = safetensors.load_file(path)
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name][0, 0] = 1e5
    safetensors.save_file(tensors, path, metadata={"format": "pt"})

    with pytest.raises(BaseModelError, match=f"fp16 holds weights up to 65504; '{name}'"):
        prepare(large, tmp_path / "cache", "fp16")


def test_an_unknown_type_of_products_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="unknown product dtype 'fp8'"):
        base.load(base.PreparedBase(tmp_path, "0" * 64, "nf4", "any"), compute_dtype="bf16", product_dtype="fp8")


@pytest.mark.parametrize(("precision", "compute"), [("bf16", "fp32"), ("fp32", "bf16"), ("int8", "fp16")])
def test_a_base_computes_in_a_precision_that_its_weights_allow(tmp_path: Path, precision: str, compute: str) -> None:
    allowed = {"bf16": "bf16", "fp32": "fp32", "int8": "bf16 or fp32"}[precision]
    with pytest.raises(BaseModelError, match=f"{precision} to compute in {allowed}; found '{compute}'"):
        base.load(base.PreparedBase(tmp_path, "0" * 64, precision, "any"), compute_dtype=compute)


def gradients_and_logits(tiny_base: Path, cache: Path, precision: str) -> tuple[Any, Any]:
    """Of LoRA over the base at a precision, computed in float32."""
    live = pytest.importorskip("edge_runtime.train.live")
    loaded = base.load(prepare(tiny_base, cache, precision)[0], compute_dtype="fp32")
    adapted = live.attach(loaded.model, tiny.MIXED, scaling=2.0)
    live.load_adapter(adapted, tiny.random_adapter(tiny.MIXED, size=0.1))
    ids = torch.arange(40)[None]
    found = adapted.model(input_ids=ids, labels=ids)
    found.loss.backward()
    factors = live.trainable_parameters(adapted).values()
    return torch.cat([parameter.grad.flatten() for parameter in factors]), found.logits.detach()


def test_eight_bit_gradients_point_where_those_of_float32_do(tiny_base: Path, tmp_path: Path) -> None:
    """And 8 bits answer more like the original than 4."""
    exact, eight, four = (gradients_and_logits(tiny_base, tmp_path, name) for name in ("fp32", "int8", "nf4"))

    assert float(torch.nn.functional.cosine_similarity(exact[0], eight[0], dim=0)) > 0.999
    errors = [float((found[1] - exact[1]).norm() / exact[1].norm()) for found in (eight, four)]
    assert errors[0] < 0.02
    assert errors[0] < errors[1] / 5


def test_plain_bases_say_what_the_original_says(tiny_base: Path, tmp_path: Path) -> None:
    original = transformers.AutoModelForCausalLM.from_pretrained(tiny_base)

    loaded = base.load(prepare(tiny_base, tmp_path, "fp32")[0], compute_dtype="fp32")

    assert torch.equal(logits_of(loaded.model), logits_of(original))


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
def test_dequantising_into_the_compute_precision_changes_no_bit(nf4: Any, compute: str) -> None:
    """The weights were float32 once; going there first costs memory and gives the same."""
    model = base.load(nf4, compute_dtype=compute).model
    direct = logits_of(model)
    for layer in base._four_bit_layers(model):
        layer.weight.quant_state.dtype = torch.float32

    assert torch.equal(logits_of(model), direct)


def evaluate_then_train(model: Any) -> Any:
    """What a round does: an evaluation, then a training step; the gradient that a 4-bit layer passes down."""
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        model.eval()(torch.arange(12)[None])
    model.train()
    hidden = torch.ones(1, 12, 64, dtype=layer.compute_dtype, requires_grad=True)
    output = layer(hidden)
    if not output.requires_grad:
        return None
    output.sum().backward()
    return hidden.grad


def test_an_evaluation_costs_no_gradient(nf4: Any) -> None:
    """Fails on a CPU with AVX512-BF16 when `load` forgets `keep_gradients`."""
    model = base.load(nf4, compute_dtype="bf16").model
    layer = model.model.layers[0].self_attn.q_proj
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)

    gradient = evaluate_then_train(model)

    assert gradient is not None
    assert torch.allclose(gradient.float(), weight.float().sum(0).expand(1, 12, 64), atol=0.05)


def test_evaluation_and_training_agree(quantised: Any) -> None:
    model = base.load(quantised, compute_dtype="bf16").model

    assert torch.equal(logits_of(model.eval()), logits_of(model.train()))


def test_without_the_cure_the_gradient_is_lost(nf4: Any) -> None:
    """Why `keep_gradients` exists; when this fails, bitsandbytes has been cured and it can go."""
    if not bitsandbytes.nn.modules.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes does not repack weights")
    model = base.load(nf4, compute_dtype="bf16").model
    for layer in base._four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = True

    assert evaluate_then_train(model) is None


def test_a_torn_file_is_an_error(tmp_path: Path, quantised: Any) -> None:
    folder = shutil.copytree(quantised.folder, tmp_path / "torn")
    truncate(folder)
    torn = base.PreparedBase(folder, quantised.fingerprint, quantised.precision, "torn")

    with pytest.raises(BaseModelError, match=r"expected .*torn to load; found: .*; remove it"):
        base.load(torn, compute_dtype="bf16")


def test_a_folder_that_transformers_cannot_load_is_an_error(tmp_path: Path, nf4: Any) -> None:
    folder = shutil.copytree(nf4.folder, tmp_path / "broken")
    (folder / "model.safetensors").unlink()
    broken = base.PreparedBase(folder, nf4.fingerprint, "nf4", "broken")

    with pytest.raises(BaseModelError, match=r"expected .*broken to load; found: .*; remove it"):
        base.load(broken, compute_dtype="bf16")


@pytest.mark.model
def test_the_real_model_speaks(tmp_path: Path) -> None:
    """From the package to an answer: weights, tokenizer and chat template of SmolLM2 after conversion to NF4."""
    loaded = base.load(base.prepare("smollm2", cache=tmp_path), compute_dtype="fp32")
    tokenizer = loaded.tokenizer
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(7):
            ids = torch.cat([ids, loaded.model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)

    assert tokenizer.encode("<|im_start|><|im_end|>", add_special_tokens=False) == [1, 2]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert prompt.startswith("<|im_start|>system\n")
    assert "Paris" in tokenizer.decode(ids[0, start:])
