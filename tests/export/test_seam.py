"""The formats that came first, asked as all formats are: what they refuse, what they write, and what comes back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from edge_runtime.errors import ExportError
from edge_runtime.lora.adapter import Adapter
from edge_runtime.train.base import PreparedBase, prepare
from export import native, peft
from export.subject import Subject
from profiles.families import FAMILIES
from tests.export.subjects import PROMPT, SCALING, family_adapter, live

pytestmark = pytest.mark.torch

CASES = [(native, name) for name in sorted(FAMILIES)]
CASES += [(peft, name) for name in sorted(FAMILIES) if "peft" in FAMILIES[name].exports]


@pytest.fixture(scope="module")
def prepared(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedBase:
    return prepare(str(tiny_base), precision="fp32", cache=tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(("form", "family"), CASES, ids=lambda each: getattr(each, "__name__", each))
def test_it_computes_and_continues_as_the_live_model_does(
    prepared: PreparedBase, tiny_base: Path, tmp_path: Path, form: ModuleType, family: str
) -> None:
    found = live(prepared, family_adapter(tiny_base, family), family)
    form.refuse(found.subject)
    form.write(found.subject, tmp_path)
    engine = form.open_engine(found.subject, tmp_path)

    assert np.abs(found.logits - found.plain).max() > 0.01
    np.testing.assert_allclose(engine.logits(PROMPT), found.logits, rtol=0, atol=1e-5)
    assert engine.greedy(PROMPT, 8) == found.greedy
    engine.close()


@pytest.mark.parametrize("form", [native, peft], ids=["native", "peft"])
@pytest.mark.parametrize("precision", ["nf4", "int8", "fp16"])
def test_a_base_kept_narrow_computes_in_float32(
    tiny_base: Path, tmp_path: Path, form: ModuleType, precision: str
) -> None:
    """The live model's weights are all that counts, not the type that it trains in."""
    narrow = prepare(str(tiny_base), precision=precision, cache=tmp_path / "cache")
    found = live(narrow, family_adapter(tiny_base, "lora"))
    (tmp_path / "out").mkdir()
    form.write(found.subject, tmp_path / "out")
    engine = form.open_engine(found.subject, tmp_path / "out")

    np.testing.assert_allclose(engine.logits(PROMPT), found.logits, rtol=0, atol=1e-5)
    assert engine.greedy(PROMPT, 8) == found.greedy


def test_families_without_a_format_of_peft_are_refused(prepared: PreparedBase, tiny_base: Path) -> None:
    subject = Subject(family_adapter(tiny_base, "lora"), SCALING, "base", None)
    peft.refuse(subject)
    native.refuse(subject)
    for family in sorted(name for name in FAMILIES if "peft" not in FAMILIES[name].exports):
        with pytest.raises(ExportError, match="as native"):
            peft.refuse(replace(subject, adapter=family_adapter(tiny_base, family), family=family, prepared=prepared))
    with pytest.raises(ExportError, match="--base"):
        peft.refuse(replace(subject, adapter=family_adapter(tiny_base, "dora"), family="dora"))
    for form in (native, peft):
        with pytest.raises(ExportError, match="at least one direction"):
            form.refuse(replace(subject, adapter=Adapter({})))


@pytest.mark.parametrize("form", [native, peft], ids=["native", "peft"])
def test_a_folder_cannot_be_opened_without_a_base(tiny_base: Path, tmp_path: Path, form: ModuleType) -> None:
    subject = Subject(family_adapter(tiny_base, "lora"), SCALING, "base", None)
    form.write(subject, tmp_path)
    with pytest.raises(ExportError, match="--base"):
        form.open_engine(subject, tmp_path)


def test_a_damaged_folder_is_an_export_error(prepared: PreparedBase, tiny_base: Path, tmp_path: Path) -> None:
    subject = Subject(family_adapter(tiny_base, "lora"), SCALING, "base", prepared)
    peft.write(subject, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}')
    with pytest.raises(ExportError, match="expected PEFT to load"):
        peft.open_engine(subject, tmp_path)
