"""What the benchmark of exports makes of its rows: the worst counts, and what was not run is not hidden."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks.export import GOALS, Row, figures
from benchmarks.result import result
from export import FORMATS
from export.parity import Distance, Parity

pytestmark = pytest.mark.torch

SMOLLM2 = "SmolLM2-135M"


def parity(difference: float, *, agreement: float = 1.0, tokens: int = 256, of_logits: bool = True) -> Parity:
    return Parity(Distance(difference, 0.0, 1.0, 10), agreement, tokens, 1.0, of_logits)


def all_good() -> list[Row]:
    """Rows that reach every goal."""
    forms = ("peft", "merged", "onnx", "onnx_adapter", "mlx")
    rows = [Row(case, form, parity(1e-6), swap_ms=0.1) for case in (SMOLLM2, "Llama") for form in forms]
    return [*rows, Row(SMOLLM2, "gguf", parity(0.2, agreement=0.97, of_logits=False))]


def met(rows: list[Row], capsys: pytest.CaptureFixture[str]) -> bool:
    reached = result("export", figures(rows), GOALS)
    assert json.loads(capsys.readouterr().out.removeprefix("RESULT "))["met"] == reached
    return reached


def test_all_goals_can_be_met_and_a_difference_of_probabilities_is_no_logit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = figures(all_good())

    assert met(all_good(), capsys)
    assert "gguf_max_logit_diff" not in found
    assert (found["gguf_token_agreement"], found["gguf_tokens"], found["swap_ms"]) == (0.97, 256, 0.1)


def test_the_worst_case_of_a_format_counts(capsys: pytest.CaptureFixture[str]) -> None:
    worse = [*all_good(), Row("Qwen2", "mlx", parity(0.5))]

    assert figures(worse)["mlx_max_logit_diff"] == 0.5
    assert not met(worse, capsys)


def test_a_format_that_was_not_run_in_one_case_does_not_hide_behind_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [*all_good(), Row("Qwen2", "onnx", note="MissingExtraError: no onnxruntime")]

    assert figures(rows)["not_run"] == ["onnx"]
    assert "onnx_max_logit_diff" not in figures(rows)
    assert not met(rows, capsys)


def test_goals_are_of_formats_that_there_are() -> None:
    names = {name.replace("-", "_") for name in FORMATS}

    assert {key.removesuffix("_max_logit_diff") for key in GOALS if key.endswith("_max_logit_diff")} <= names
