"""Conversion tensor by tensor gives what transformers gives when it quantises a whole model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import BaseModelError
from tests.train.conftest import BuildTinyBase

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
convert = pytest.importorskip("edge_runtime.train.convert")
checkpoint = pytest.importorskip("edge_runtime.train.checkpoint")
source = pytest.importorskip("edge_runtime.train.source")


def converted(folder: Path, target: Path, precision: str) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    convert.convert(source.resolve(str(folder)), target, precision)
    return target


def tensors_in(folder: Path) -> dict[str, Any]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors_torch.load_file(path).items()
    }


def loaded(folder: Path, **settings: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, **settings).train()


def logits_of(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


def quantised_on_load(folder: Path, dtype: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return loaded(folder, quantization_config=settings, dtype=dtype)


@pytest.mark.parametrize("piece", [1 << 20, 64 * 64])
def test_quantised_tensors_equal_those_of_quantising_on_load(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """However few rows are quantised at once: scales of scales span them all."""
    monkeypatch.setattr(checkpoint, "PIECE", piece)
    reference = quantised_on_load(tiny_base, torch.float32).state_dict()

    ours = tensors_in(converted(tiny_base, tmp_path / "nf4", "nf4"))

    assert set(ours) == set(reference) - {"lm_head.weight"}
    linear = [name for name, tensor in ours.items() if tensor.dtype == torch.uint8]
    # Seven linear layers in each of three blocks, each with its packed weight, scales of scales, and state.
    assert len([name for name in linear if name.endswith("_proj.weight")]) == 21
    for name, tensor in ours.items():
        same = tensor if "_proj." in name else tensor.float()
        expected = reference[name] if "_proj." in name else reference[name].bfloat16().float()
        assert torch.equal(same, expected), name


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_those_of_quantising_on_load(build_tiny_base: BuildTinyBase, tmp_path: Path, tied: bool) -> None:
    base = build_tiny_base(tied=tied, dtype="bfloat16")
    expected = logits_of(quantised_on_load(base, torch.bfloat16))

    model = loaded(converted(base, tmp_path / "nf4", "nf4"), dtype=torch.bfloat16)

    assert torch.equal(logits_of(model), expected)
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) is tied


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("fp32", "float32")])
def test_plain_precisions_only_round(tiny_base: Path, tmp_path: Path, precision: str, dtype: str) -> None:
    folder = converted(tiny_base, tmp_path / precision, precision)

    original = tensors_in(tiny_base)
    assert set(tensors_in(folder)) == set(original)
    for name, tensor in tensors_in(folder).items():
        assert torch.equal(tensor, original[name].to(getattr(torch, dtype))), name
    assert torch.equal(logits_of(loaded(folder, dtype="auto")), logits_of(loaded(tiny_base, dtype=dtype)))


def test_eight_bit_weights_do_not_depend_on_how_they_are_read(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tensors_in(converted(tiny_base, tmp_path / "whole", "int8"))
    monkeypatch.setattr(checkpoint, "PIECE", 1)

    found = tensors_in(converted(tiny_base, tmp_path / "pieces", "int8"))

    original = tensors_in(tiny_base)
    scales = {name for name in found if name.endswith(".scale")}
    assert len(scales) == 21
    assert found.keys() - scales == original.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, whole[name]), name
        if tensor.dtype == torch.int8:
            scale = found[name.replace(".weight", ".scale")].float()[:, None]
            assert bool(((tensor * scale - original[name]).abs() <= scale * 0.501).all()), name
        elif name not in scales:
            assert torch.equal(tensor, original[name].bfloat16()), name


def test_weights_that_are_not_finite_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = broken(tiny_base, tmp_path)
    tensors = tensors_in(folder)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("inf")
    safetensors_torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(BaseModelError, match=r"expected finite weights in 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        converted(folder, tmp_path / "x", "int8")


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16", "fp32"])
def test_a_conversion_that_would_not_fit_is_refused_before_it_starts(
    tiny_base: Path, tmp_path: Path, precision: str
) -> None:
    found = source.resolve(str(tiny_base))
    target = tmp_path / "x"
    target.mkdir()
    with pytest.raises(
        BaseModelError, match=rf"expected \d+ MiB of memory to convert .* to {precision}; found 64 MiB; .*prepare"
    ):
        convert.convert(found, target, precision, memory_bytes=64 << 20)

    assert not list(target.iterdir())
    convert.convert(found, target, precision, memory_bytes=1 << 40)


def test_what_a_conversion_takes_grows_with_its_largest_tensor(tiny_base: Path) -> None:
    """And not with the whole: the layers of a model are written as they come."""
    small = checkpoint.open_folder(tiny_base)
    embedding, block = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
    shapes = {name: small.shape(name) for name in small.names}

    def needed(shape_of: dict[str, tuple[int, ...]]) -> int:
        made = checkpoint.Checkpoint(small.config, tuple(shape_of), shape_of.__getitem__, small.rows, lambda _: None)
        return int(convert.conversion_bytes(made, "bf16", "folder"))

    wider = needed(shapes | {embedding: (512, 1 << 20)}) - needed(shapes | {embedding: (512, 1 << 19)})
    deeper = needed(shapes | {f"{block}.{index}": (4096, 4096) for index in range(100)})
    assert wider == 512 << 20
    assert deeper < needed(shapes) + 3 * convert.SHARD_BYTES


def test_large_models_are_written_in_pieces_that_load_alike(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = converted(tiny_base, tmp_path / "whole", "nf4")
    monkeypatch.setattr(convert, "SHARD_BYTES", 20_000)

    pieces = converted(tiny_base, tmp_path / "pieces", "nf4")

    assert [path.name for path in whole.glob("*.safetensors")] == ["model.safetensors"]
    assert len(list(pieces.glob("*.safetensors"))) > 2
    weight_map = json.loads((pieces / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    # A weight and its scales stay together.
    beside = [name for name in weight_map if ".weight." in name]
    assert beside
    assert all(weight_map[name] == weight_map[name.split(".weight.")[0] + ".weight"] for name in beside)
    expected, found = (logits_of(loaded(folder, dtype=torch.float32)) for folder in (whole, pieces))
    assert torch.equal(found, expected)


def test_a_sharded_base_is_read(tiny_base: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base)
    model.save_pretrained(sharded, max_shard_size="200KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_base / name, sharded / name)
    assert len(source.weight_files(sharded)) > 1

    found = tensors_in(converted(sharded, tmp_path / "nf4", "nf4"))

    expected = tensors_in(converted(tiny_base, tmp_path / "expected", "nf4"))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_tokenizer_and_its_template_come_along(tiny_base: Path, tmp_path: Path) -> None:
    before = transformers.AutoTokenizer.from_pretrained(tiny_base)

    after = transformers.AutoTokenizer.from_pretrained(converted(tiny_base, tmp_path / "bf16", "bf16"))

    text = "<|im_start|>user\ndef f(a, b=1): return 42<|im_end|>"
    assert after.encode(text) == before.encode(text)
    assert after.chat_template == before.chat_template
    assert (after.eos_token, after.pad_token) == (before.eos_token, before.pad_token)


def broken(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "broken"))


def test_an_unknown_precision_lists_the_known_ones(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"'int3'.*bf16, fp16, fp32, int8, nf4"):
        converted(tiny_base, tmp_path / "x", "int3")


def test_weights_that_are_quantised_already_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    nf4 = converted(tiny_base, tmp_path / "nf4", "nf4")

    with pytest.raises(BaseModelError, match=r"expected plain weights in .*quantised by bitsandbytes"):
        converted(nf4, tmp_path / "again", "nf4")


def test_missing_tensors_are_named(tiny_base: Path, tmp_path: Path) -> None:
    folder = broken(tiny_base, tmp_path)
    tensors = tensors_in(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    safetensors_torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(BaseModelError, match=r"none named model\.layers\.1\.mlp\.up_proj\.weight \(1 missing\)"):
        converted(folder, tmp_path / "x", "nf4")


def test_a_base_without_tokenizer_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = broken(tiny_base, tmp_path)
    (folder / "tokenizer.json").unlink()

    with pytest.raises(BaseModelError, match="expected a tokenizer"):
        converted(folder, tmp_path / "x", "nf4")


def test_an_unknown_kind_of_model_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = broken(tiny_base, tmp_path)
    (folder / "config.json").write_text('{"model_type": "martian"}', encoding="utf-8")

    with pytest.raises(BaseModelError, match=r"that transformers \S+ knows; found: .*martian"):
        converted(folder, tmp_path / "x", "nf4")


def test_settings_of_transformers_5_are_kept_where_4_looks_for_them() -> None:
    """Version 4 ignores `rope_parameters` and would silently rotate with its default base."""
    plain = checkpoint.portable_config({"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}})
    scaled = checkpoint.portable_config({"rope_parameters": {"rope_theta": 1e5, "rope_type": "linear", "factor": 2.0}})
    tokenizer = checkpoint.portable_tokenizer({"tokenizer_class": "TokenizersBackend", "extra_special_tokens": []})

    assert (plain["rope_theta"], "rope_scaling" in plain) == (1e5, False)
    assert scaled["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert checkpoint.portable_config({"torch_dtype": "float16", "rope_theta": 1.0}) == {
        "dtype": "float16",
        "rope_theta": 1.0,
    }
    assert tokenizer == {"tokenizer_class": "PreTrainedTokenizerFast"}
