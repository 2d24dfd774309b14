"""Adapters of every family leave the house, and compute outside what they computed inside."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from edge_runtime.errors import ExportError  # noqa: E402 - after the check that torch is there
from edge_runtime.lora.adapter import Adapter  # noqa: E402 - as above
from edge_runtime.lora.native import CONFIG, WEIGHTS, is_native_folder, read_native_folder  # noqa: E402 - as above
from edge_runtime.train import families  # noqa: E402 - as above
from edge_runtime.train.base import PreparedBase, prepare  # noqa: E402 - as above
from edge_runtime.train.base import load as load_base  # noqa: E402 - as above
from edge_runtime.train.live import LiveModel  # noqa: E402 - as above
from export import get, reading, verify  # noqa: E402 - as above
from export.subject import Subject  # noqa: E402 - as above
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


def live_of(prepared: PreparedBase, tiny_base: Path, name: str) -> tuple[LiveModel, Subject]:
    base = load_base(prepared, compute_dtype="bf16", device="cpu").model
    slot = slot_of(card_of(tiny_base), name)
    live = families.get(name).attach(base, slot, scaling=2.0)
    families.get(name).load(live, adapter_for(slot))
    return live, Subject(families.get(name).read_all(live), 2.0, str(prepared.folder), prepared, name)


@pytest.mark.parametrize("name", EVERY)
def test_the_formats_of_a_family_compute_what_the_live_model_computes(
    prepared: PreparedBase, tiny_base: Path, tmp_path: Path, name: str
) -> None:
    live, subject = live_of(prepared, tiny_base, name)
    known = verify.reference_of(live, PROMPTS, tmp_path, count=3)
    for form in {*FAMILIES[name].exports, "native"}:
        (tmp_path / form).mkdir()
        get(form).refuse(subject)
        get(form).write(subject, tmp_path / form)
        parity = verify.judge(known, get(form).open_engine(subject, tmp_path / form))
        assert parity.distance.max_logit_diff <= get(form).tolerance
        assert parity.agreement == 1.0
        assert parity.effect > 0.01
    found = reading.read(tmp_path / "native")
    assert found.adapter.digest() == subject.adapter.digest()
    assert found.origin.family == name


@pytest.mark.parametrize("name", [name for name in EVERY if "peft" not in FAMILIES[name].exports])
def test_what_peft_has_no_format_for_is_refused_with_one_that_has(tiny_base: Path, name: str) -> None:
    adapter = adapter_for(slot_of(card_of(tiny_base), name))
    with pytest.raises(ExportError, match="as native"):
        get("peft").refuse(Subject(adapter, 2.0, "base", None, name))


def test_without_the_magnitudes_of_the_base_peft_is_refused_with_what_works(tiny_base: Path) -> None:
    adapter = adapter_for(slot_of(card_of(tiny_base), "dora"))
    with pytest.raises(ExportError, match="--base"):
        get("peft").refuse(Subject(adapter, 2.0, "base", None, "dora"))


def test_a_native_folder_that_is_damaged_is_an_export_error(tiny_base: Path, tmp_path: Path) -> None:
    subject = Subject(adapter_for(slot_of(card_of(tiny_base), "ia3")), 2.0, "base", None, "ia3")
    folder = tmp_path / "whole"
    get("native").write(subject, folder)
    assert is_native_folder(folder)
    (folder / WEIGHTS).write_bytes(b"nonsense")
    with pytest.raises(ExportError, match="export it again"):
        read_native_folder(folder)
    (folder / CONFIG).write_text('{"format": 9}', encoding="utf-8")
    with pytest.raises(ExportError, match="format"):
        read_native_folder(folder)
    with pytest.raises(ExportError, match="none"):
        get("native").refuse(Subject(Adapter({}), 2.0, "base", None))
