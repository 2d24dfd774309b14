"""mlx-lm computes from an exported adapter what the live model computes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.numpy import load_file

from edge_runtime.errors import ExportError, MissingExtraError
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.train.base import PreparedBase
from export import mlx, native
from export.subject import Subject
from tests.export.architectures import prepared_base, uneven_adapter
from tests.export.subjects import PROMPT, SCALING, family_adapter, live

pytestmark = pytest.mark.torch
Prepare = Callable[..., PreparedBase]


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Prepare:
    """Prepares a tiny base: `base("qwen2", precision=…, **settings)`."""
    return lambda model_type, **settings: prepared_base(tmp_path / "base", tiny_base, model_type, **settings)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", mlx.ARCHITECTURES)
def test_mlx_computes_what_the_live_model_computes(base: Prepare, tmp_path: Path, model_type: str, tied: bool) -> None:
    """Every kind of layer, ranks that differ by layer, a first block without any, grouped heads."""
    pytest.importorskip("mlx_lm")
    prepared = base(model_type, tie_word_embeddings=tied)
    found = live(prepared, uneven_adapter(prepared))
    mlx.refuse(found.subject)
    mlx.write(found.subject, tmp_path)
    engine = mlx.open_engine(found.subject, tmp_path)

    assert np.abs(found.logits - found.plain).max() > 0.3
    np.testing.assert_allclose(engine.logits(PROMPT), found.logits, rtol=0, atol=1e-4)
    assert engine.greedy(PROMPT, 8) == found.greedy
    engine.close()


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
def test_it_is_verified_on_the_weights_that_the_live_model_has(base: Prepare, tmp_path: Path, precision: str) -> None:
    pytest.importorskip("mlx_lm")
    prepared = base("llama", precision=precision)
    subject = Subject(uneven_adapter(prepared), SCALING, "base", prepared)
    (tmp_path / "native").mkdir()
    native.write(subject, tmp_path / "native")
    expected = native.open_engine(subject, tmp_path / "native").logits(PROMPT)
    mlx.write(subject, tmp_path)

    np.testing.assert_allclose(mlx.open_engine(subject, tmp_path).logits(PROMPT), expected, rtol=0, atol=1e-4)


def test_a_folder_that_lost_its_scale_does_not_agree(base: Prepare, tmp_path: Path) -> None:
    """What the comparison is there to find: it loads, and answers otherwise."""
    pytest.importorskip("mlx_lm")
    prepared = base("llama")
    found = live(prepared, uneven_adapter(prepared))
    mlx.write(found.subject, tmp_path)
    about = json.loads((tmp_path / mlx.CONFIG).read_text(encoding="utf-8"))
    about["lora_parameters"]["scale"] = 1.0
    (tmp_path / mlx.CONFIG).write_text(json.dumps(about), encoding="utf-8")

    assert np.abs(mlx.open_engine(found.subject, tmp_path).logits(PROMPT) - found.logits).max() > 1e-2


def test_pairs_are_transposed_and_padded_to_the_largest_rank(base: Prepare, tmp_path: Path) -> None:
    prepared = base("qwen2")
    adapter = Adapter({**uneven_adapter(prepared), "model.layers.0.self_attn.q_proj": _empty()})
    mlx.write(Subject(adapter, SCALING, "org/base", prepared), tmp_path)
    about = json.loads((tmp_path / mlx.CONFIG).read_text(encoding="utf-8"))
    tensors = load_file(tmp_path / mlx.WEIGHTS)
    rank = max(adapter.ranks.values())

    assert about["fine_tune_type"] == "lora"
    assert about["num_layers"] == 2  # nothing in the first of three blocks
    assert about["lora_parameters"]["rank"] == rank
    assert about["lora_parameters"]["scale"] == SCALING
    assert len(about["lora_parameters"]["keys"]) == 7
    assert len(tensors) == 2 * 14
    for name, pair in adapter.items():
        if pair.rank:
            a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
            assert (a.shape, b.shape) == ((pair.shape[1], rank), (rank, pair.shape[0]))
            np.testing.assert_array_equal(a[:, : pair.rank], pair.a.T)
            np.testing.assert_array_equal(b[: pair.rank], pair.b.T / SCALING)
            assert not a[:, pair.rank :].any()
            assert not b[pair.rank :].any()


def _empty() -> Pair:
    return Pair(np.zeros((0, 64), np.float32), np.zeros((64, 0), np.float32))


def test_what_mlx_cannot_hold_is_refused_by_name(base: Prepare, tiny_base: Path) -> None:
    prepared = base("llama")
    subject = Subject(uneven_adapter(prepared), SCALING, "base", prepared)
    config = json.loads((prepared.folder / "config.json").read_text(encoding="utf-8"))

    with pytest.raises(ExportError, match="family 'dora'"):
        mlx.refuse(replace(subject, adapter=family_adapter(tiny_base, "dora"), family="dora"))
    with pytest.raises(ExportError, match="'lm_head'"):
        mlx.refuse(replace(subject, adapter=Adapter({"lm_head": _pair()})))
    with pytest.raises(ExportError, match="at least one direction"):
        mlx.refuse(replace(subject, adapter=Adapter({"model.layers.0.self_attn.q_proj": _empty()})))
    with pytest.raises(ExportError, match="--base"):
        mlx.refuse(replace(subject, prepared=None))
    (prepared.folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}), encoding="utf-8")
    with pytest.raises(ExportError, match=r"'gpt2'.*llama, mistral.*as merged"):
        mlx.refuse(subject)


def _pair() -> Pair:
    return Pair(np.ones((2, 64), np.float32), np.ones((64, 2), np.float32))


def test_a_folder_that_mlx_does_not_load_is_an_export_error(base: Prepare, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    prepared = base("llama")
    subject = Subject(uneven_adapter(prepared), SCALING, "base", prepared)
    mlx.write(subject, tmp_path)
    about = json.loads((tmp_path / mlx.CONFIG).read_text(encoding="utf-8"))
    about["lora_parameters"]["rank"] += 1
    (tmp_path / mlx.CONFIG).write_text(json.dumps(about), encoding="utf-8")

    with pytest.raises(ExportError, match="expected mlx-lm to load"):
        mlx.open_engine(subject, tmp_path)


def test_without_mlx_the_error_says_what_to_install(
    base: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = base("llama")
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    with pytest.raises(MissingExtraError, match=r"edge-runtime\[verify\]"):
        mlx.open_engine(Subject(uneven_adapter(prepared), SCALING, "base", prepared), tmp_path)
