"""A merged folder computes what the live model computes, and rounds each weight once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402 - after the check that torch is there

from edge_runtime.errors import BaseModelError, ExportError  # noqa: E402 - as above
from edge_runtime.lora.adapter import Adapter, Pair  # noqa: E402 - as above
from edge_runtime.lora.dense import as_pair  # noqa: E402 - as above
from edge_runtime.train import checkpoint  # noqa: E402 - as above
from edge_runtime.train.base import PreparedBase, prepare  # noqa: E402 - as above
from export import merged, merging  # noqa: E402 - as above
from export.subject import Subject  # noqa: E402 - as above
from tests.export.subjects import LINEAR, PROMPT, SCALING, family_adapter, live  # noqa: E402 - as above
from tests.train.conftest import BuildTinyBase  # noqa: E402 - as above

pytestmark = pytest.mark.torch

MERGEABLE = ("bitfit", "dora", "ia3", "layer_norm", "lora", "sparse")
QUERY = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def prepared(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedBase:
    return prepare(str(tiny_base), precision="fp32", cache=tmp_path_factory.mktemp("cache"))


def subject_of(prepared: PreparedBase | None, layers: dict[str, Pair], base_name: str = "base") -> Subject:
    return Subject(Adapter(layers), SCALING, base_name, prepared)


def pair(d_out: int, d_in: int, rank: int = 3, seed: int = 0) -> Pair:
    draw = np.random.default_rng(seed)
    a, b = draw.standard_normal((rank, d_in)), draw.standard_normal((d_out, rank))
    return Pair((0.3 * a).astype(np.float32), (0.3 * b).astype(np.float32))


def tensors_in(folder: Path) -> dict[str, Any]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("family", MERGEABLE)
def test_a_merged_model_computes_what_the_live_one_computes(
    prepared: PreparedBase, tiny_base: Path, tmp_path: Path, family: str
) -> None:
    found = live(prepared, family_adapter(tiny_base, family), family)
    assert np.abs(found.logits - found.plain).max() > 0.01

    merged.refuse(found.subject)
    merged.write(found.subject, tmp_path, weights="fp32")
    engine = merged.open_engine(found.subject, tmp_path)

    np.testing.assert_allclose(engine.logits(PROMPT), found.logits, rtol=0, atol=1e-4)
    assert engine.greedy(PROMPT, 8) == found.greedy
    engine.close()


@pytest.mark.parametrize("family", MERGEABLE)
def test_how_many_rows_are_merged_at_once_does_not_matter(
    prepared: PreparedBase, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    subject = Subject(family_adapter(tiny_base, family, LINEAR if family == "lora" else ()), SCALING, "", prepared)
    whole = merging.merged(subject)
    expected = {name: whole.read(name) for name in whole.names}
    monkeypatch.setattr(checkpoint, "PIECE", 1)  # 64 rows

    for name, tensor in expected.items():
        torch.testing.assert_close(whole.read(name), tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("weights", "bits"), [("bf16", 8), ("fp16", 11)])
def test_every_weight_is_rounded_once(prepared: PreparedBase, tmp_path: Path, weights: str, bits: int) -> None:
    """It is as near to the sum in float64 as a number of so many bits can be, but for the rounding of float32."""
    change = pair(64, 64)
    merged.write(subject_of(prepared, {QUERY: change}), tmp_path, weights=weights)

    base = tensors_in(prepared.folder)[f"{QUERY}.weight"].double().numpy()
    exact = base + change.b.astype(np.float64) @ change.a.astype(np.float64)
    found = tensors_in(tmp_path)[f"{QUERY}.weight"]
    half_a_unit = 2.0 ** (np.floor(np.log2(np.abs(exact))) - bits)

    assert (np.abs(found.double().numpy() - exact) <= half_a_unit * 1.001 + 1e-7).all()
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(found.dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    ("stored", "expected"), [("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]
)
def test_a_folder_is_as_narrow_as_its_base(
    build_tiny_base: BuildTinyBase, tmp_path: Path, stored: str, expected: str
) -> None:
    base = build_tiny_base(dtype=stored)
    precision = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}[stored]
    plain = prepare(str(base), precision=precision, cache=tmp_path / "cache")
    (out := tmp_path / "out").mkdir()

    merged.write(subject_of(plain, {QUERY: pair(64, 64)}), out)

    assert {str(tensor.dtype) for tensor in tensors_in(out).values()} == {f"torch.{expected}"}
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    assert transformers.AutoTokenizer.from_pretrained(out).encode("one", add_special_tokens=False)


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_nothing_is_merged_into_quantised_weights(
    prepared: PreparedBase, tiny_base: Path, tmp_path: Path, precision: str
) -> None:
    """They are taken from the base that was quantised."""
    quantised = prepare(str(tiny_base), precision=precision, cache=tmp_path)
    layers = {QUERY: pair(64, 64)}

    found = merging.merged(subject_of(quantised, layers, str(tiny_base)))

    expected = merging.merged(subject_of(prepared, layers))
    for name in expected.names:
        assert torch.equal(found.read(name), expected.read(name)), name


def test_quantised_weights_without_their_original_are_refused(
    tiny_base: Path, build_tiny_base: BuildTinyBase, tmp_path: Path
) -> None:
    quantised = prepare(str(tiny_base), precision="int8", cache=tmp_path)
    with pytest.raises(BaseModelError, match=r"not merged into int8 weights.*give the original base"):
        merged.refuse(subject_of(quantised, {QUERY: pair(64, 64)}, str(quantised.folder)))
    with pytest.raises(BaseModelError, match=r"to be the base model that was prepared"):
        merged.refuse(subject_of(quantised, {QUERY: pair(64, 64)}, str(build_tiny_base(tied=False))))


@pytest.mark.parametrize("family", ["bottleneck", "prefix", "prompt"])
def test_what_is_no_change_of_weights_is_refused_by_name(
    prepared: PreparedBase, tiny_base: Path, tmp_path: Path, family: str
) -> None:
    adapter = family_adapter(tiny_base, family)
    with pytest.raises(ExportError, match=f"'{min(adapter)}' is no change.*export the adapter as native"):
        merged.refuse(Subject(adapter, SCALING, "base", None, family))
    with pytest.raises(ExportError, match="cannot be merged"):
        merged.write(Subject(adapter, SCALING, "base", prepared, family), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.layers.7.self_attn.q_proj", pair(64, 64), r"no layer 'model\.layers\.7\.self_attn\.q_proj'"),
        (QUERY, pair(64, 32), r"q_proj' has the shape \(64, 32\), where the base model's weight is \(64, 64\)"),
        ("lm_head", pair(512, 64), "'lm_head' shares its weight with the embedding"),
        (f"{QUERY}#scale", as_pair(np.ones((1, 32), np.float32), [0], 1), "has the shape"),
        ("model.norm#bias", as_pair(np.ones((1, 64), np.float32), [0], 1), "'model.norm' has no bias"),
        (QUERY, Pair(np.zeros((0, 64), np.float32), np.zeros((64, 0), np.float32)), "train it first"),
    ],
)
def test_layers_that_the_base_cannot_hold_are_named(
    prepared: PreparedBase, name: str, change: Pair, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        merged.refuse(subject_of(prepared, {name: change}))


def test_a_head_of_its_own_is_merged(build_tiny_base: BuildTinyBase, tmp_path: Path) -> None:
    untied = prepare(str(build_tiny_base(tied=False)), precision="fp32", cache=tmp_path)
    change = pair(512, 64)
    found = merging.merged(subject_of(untied, {"lm_head": change}))
    expected = tensors_in(untied.folder)["lm_head.weight"] + torch.from_numpy(change.product())
    torch.testing.assert_close(found.read("lm_head.weight"), expected, rtol=0, atol=1e-5)


def test_without_a_base_there_is_nothing_to_merge_into(tmp_path: Path) -> None:
    merged.refuse(subject_of(None, {QUERY: pair(64, 64)}))
    with pytest.raises(ExportError, match="found none; give them with --base"):
        merged.write(subject_of(None, {QUERY: pair(64, 64)}), tmp_path)


def test_biases_that_the_architecture_has_are_changed_and_others_refused(
    prepared: PreparedBase, tmp_path: Path
) -> None:
    """Qwen2 has biases in q, k and v, and no setting that gives one to o."""
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((prepared.folder / name).read_bytes())
    qwen = replace(prepared, folder=tmp_path)
    there, absent = (f"model.layers.0.self_attn.{module}" for module in ("q_proj", "o_proj"))
    added = as_pair(np.full((1, 32), 0.5, np.float32), [0], 1)

    found = merging.merged(subject_of(qwen, {f"{there}#bias": added})).read(f"{there}.bias")

    torch.testing.assert_close(found, tensors_in(tmp_path)[f"{there}.bias"] + 0.5)
    with pytest.raises(ExportError, match=r"o_proj' has no bias in a Qwen2ForCausalLM"):
        merging.merged(subject_of(qwen, {f"{absent}#bias": added}))


def test_a_folder_that_is_damaged_is_an_export_error(prepared: PreparedBase, tmp_path: Path) -> None:
    subject = subject_of(prepared, {QUERY: pair(64, 64)})
    merged.write(subject, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="expected transformers to load"):
        merged.open_engine(subject, tmp_path)
