"""Adapters of every family leave the house, and compute outside what they computed inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from edge_runtime.errors import ExportError  # noqa: E402 - after the check that torch is there
from edge_runtime.lora.adapter import Adapter  # noqa: E402 - as above
from edge_runtime.lora.native import CONFIG, WEIGHTS, forget_native_folder, is_native_folder, read_native_folder  # noqa: E402 - as above
from edge_runtime.train import families, mixed  # noqa: E402 - as above
from edge_runtime.train.base import PreparedBase, prepare  # noqa: E402 - as above
from edge_runtime.train.base import load as load_base  # noqa: E402 - as above
from export import get, verify  # noqa: E402 - as above
from profiles.families import FAMILIES  # noqa: E402 - as above
from tests.train.fleet_families import card_of, slot_of  # noqa: E402 - as above
from tests.train.test_dense_modules import adapter_for  # noqa: E402 - as above

pytestmark = pytest.mark.torch

PROMPTS = ((5, 9, 77), (301, 4, 4, 18, 260))
EVERY = sorted(FAMILIES)


@pytest.fixture(scope="module", params=["bf16", "nf4"])
def prepared(request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedBase:
    cache = tmp_path_factory.mktemp("cache")
    return prepare(str(tiny_base), precision=request.param, cache=cache, memory_bytes=None, say=lambda _: None)


def live_of(prepared: PreparedBase, tiny_base: Path, name: str) -> tuple[Adapter, np.ndarray, dict[str, Any]]:
    base = load_base(prepared, compute_dtype="bf16", device="cpu").model
    slot = slot_of(card_of(tiny_base), name)
    live = families.get(name).attach(base, slot, scaling=2.0)
    families.get(name).load(live, adapter_for(slot))
    return families.get(name).read_all(live), verify.live_logits(live, PROMPTS), mixed.of_base(live)


@pytest.mark.parametrize("name", EVERY)
def test_the_formats_of_a_family_compute_what_the_live_model_computes(
    prepared: PreparedBase, tiny_base: Path, tmp_path: Path, name: str
) -> None:
    adapter, inside, of_base = live_of(prepared, tiny_base, name)
    for form in {*FAMILIES[name].exports, "native"}:
        more = {"of_base": of_base} if form == "peft" else {}
        folder = get(form).write(adapter, tmp_path / form, base_name=str(prepared.folder), scaling=2.0, **more)
        parity = verify.VERIFIERS[form](folder, prepared, PROMPTS, inside)
        assert parity.max_abs <= verify.TOLERANCE
        assert parity.effect > 0.01
    assert read_native_folder(tmp_path / "native").adapter.digest() == adapter.digest()


@pytest.mark.parametrize("name", [name for name in EVERY if "peft" not in FAMILIES[name].exports])
def test_what_peft_has_no_format_for_is_refused_with_one_that_has(tiny_base: Path, tmp_path: Path, name: str) -> None:
    adapter = adapter_for(slot_of(card_of(tiny_base), name))
    with pytest.raises(ExportError, match="as native"):
        get("peft").write(adapter, tmp_path, base_name="base", scaling=2.0)
    assert not list(tmp_path.iterdir())


def test_without_the_magnitudes_of_the_base_peft_is_refused_with_what_works(tiny_base: Path, tmp_path: Path) -> None:
    adapter = adapter_for(slot_of(card_of(tiny_base), "dora"))
    with pytest.raises(ExportError, match="as native"):
        get("peft").write(adapter, tmp_path, base_name="base", scaling=2.0)
    assert not list(tmp_path.iterdir())


def test_a_native_folder_that_is_damaged_is_an_export_error(tiny_base: Path, tmp_path: Path) -> None:
    adapter = adapter_for(slot_of(card_of(tiny_base), "ia3"))
    folder = get("native").write(adapter, tmp_path / "whole", base_name="base", scaling=2.0)
    assert is_native_folder(folder)
    forget_native_folder(tmp_path / "nowhere")
    forget_native_folder(get("native").write(adapter, tmp_path / "other", base_name="base", scaling=2.0))
    assert not list((tmp_path / "other").iterdir())
    (folder / WEIGHTS).write_bytes(b"nonsense")
    with pytest.raises(ExportError, match="export it again"):
        read_native_folder(folder)
    (folder / CONFIG).write_text('{"format": 9}', encoding="utf-8")
    with pytest.raises(ExportError, match="format"):
        read_native_folder(folder)
    with pytest.raises(ExportError, match="none"):
        get("native").write(Adapter({}), tmp_path / "empty", base_name="base", scaling=2.0)
