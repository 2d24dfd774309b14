"""A merged model computes in OpenVINO what the live model computes, and nobody is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("optimum.exporters.onnx")

from edge_runtime.errors import ExportError, MissingExtraError  # noqa: E402 - after the checks above
from edge_runtime.train.base import prepare  # noqa: E402 - as above
from export import openvino  # noqa: E402 - as above
from tests.export.subjects import LINEAR, PROMPT, TRACES, Live, family_adapter, live  # noqa: E402 - as above

pytestmark = [pytest.mark.torch, pytest.mark.skipif(not TRACES, reason="optimum-onnx needs transformers below 4.58")]


@pytest.fixture(scope="module")
def library() -> Any:
    """OpenVINO, where the extra is installed."""
    try:
        return openvino._openvino()
    except MissingExtraError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def lora(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Live:
    prepared = prepare(str(tiny_base), precision="fp32", cache=tmp_path_factory.mktemp("cache"))
    return live(prepared, family_adapter(tiny_base, "lora", LINEAR))


@pytest.fixture(scope="module", params=["fp32", "int4"])
def written(
    library: Any, lora: Live, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    openvino.refuse(lora.subject)
    openvino.write(lora.subject, folder, weights=request.param)
    return request.param, folder


def test_openvino_computes_what_the_live_model_computes(lora: Live, written: tuple[str, Path]) -> None:
    weights, folder = written
    engine = openvino.open_engine(lora.subject, folder)
    found = engine.logits(PROMPT)
    if weights == "fp32":
        np.testing.assert_allclose(found, lora.logits, rtol=0, atol=1e-4)
        assert engine.greedy(PROMPT, 8) == lora.greedy
    else:
        assert 1e-3 < np.abs(found - lora.logits).mean() / np.abs(lora.logits).mean() < 0.4
        assert (folder / "openvino_model.bin").stat().st_size < 250_000
    engine.close()


def test_all_that_a_reader_needs_lies_in_the_folder(written: tuple[str, Path]) -> None:
    _, folder = written
    names = {path.name for path in folder.iterdir()}
    assert names >= {openvino.MODEL, "openvino_model.bin", "config.json", "generation_config.json", "tokenizer.json"}
    assert not any(name.startswith((".", "model.onnx")) for name in names)


def test_a_damaged_model_is_an_export_error(library: Any, lora: Live, tmp_path: Path) -> None:
    (tmp_path / openvino.MODEL).write_text("nonsense", encoding="utf-8")
    with pytest.raises(ExportError, match="expected OpenVINO to load"):
        openvino.open_engine(lora.subject, tmp_path)


def test_telemetry_is_not_imported(library: Any) -> None:
    code = (
        "import sys; from export import openvino; openvino._openvino(); "
        "sys.exit(bool([name for name, found in sys.modules.items() if 'openvino_telemetry' in name and found]))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_openvino_says_how_to_install_it(lora: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"'openvino'.*edge-runtime\[openvino\]"):
        openvino.refuse(lora.subject)
