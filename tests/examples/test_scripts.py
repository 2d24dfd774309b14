"""The examples run as a reader runs them: each script as a process, with few steps."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from edge_runtime.lora.files import read_peft_folder
from edge_runtime.train.encoder import ENCODERS
from tests.product import QUIET
from tests.train.encoders import colours, write_encoder

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name != "__init__.py")


def run(script: str, folder: Path, *arguments: str, code: int = 0) -> str:
    """What the script prints, run in a folder of its own; standard error where it fails on purpose."""
    ended = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        cwd=folder,
        env={**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr if code else ended.stdout


def installed(distribution: str) -> bool:
    return any(found.metadata["Name"] == distribution for found in importlib.metadata.distributions())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_short_and_in_the_table(script: Path) -> None:
    """At most 80 lines, the docstring and the command line among them."""
    text = script.read_text(encoding="utf-8")
    table = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")

    assert len(text.splitlines()) <= 80
    assert f"examples/{script.name}" in (ast.get_docstring(ast.parse(text)) or "")
    assert f"]({script.name})" in table


@pytest.mark.story
def test_personal_finetuning_of_a_tiny_base_leaves_an_adapter(tmp_path: Path, tiny_base: Path) -> None:
    rows = [{"prompt": f"say {n}", "completion": f"{n} it is"} for n in range(12)]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    own = ("--base", str(tiny_base), "--precision", "fp32", "--data", "my.jsonl", "--steps", "2")
    printed = run("personal_finetuning.py", tmp_path, *own, "--rank", "2", "--out", "mine")
    logged = [json.loads(line) for line in (tmp_path / "mine" / "metrics.jsonl").read_text("utf-8").splitlines()]

    assert re.search(r"loss +│ +\d", printed)
    assert re.search(r"rouge_l +│ +\d", printed)
    assert [line.get("step") for line in logged] == [None, 1, 2, 2]
    assert set(read_peft_folder(tmp_path / "mine").ranks.values()) == {2}


@pytest.mark.story
def test_own_dataset_reports_bad_rows_by_line_and_trains_on_the_others(tmp_path: Path, tiny_base: Path) -> None:
    rows = ['{"question": "a?", "answer": "b"}', '{"question": "c?"}', "[]", "{"]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    base = ("--base", str(tiny_base), "--precision", "fp32")
    printed = run("own_dataset.py", tmp_path, *base, "--data", "rows.jsonl", "--steps", "3")

    assert [line for line in range(1, 5) if f"line {line} is left out" in printed] == [2, 3, 4]
    assert "1 examples" in printed
    assert re.search(r"3 +│ +\d+\.\d+", printed)
    (tmp_path / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    assert "none that is good" in run("own_dataset.py", tmp_path, *base, "--data", "rows.jsonl", code=1)


@pytest.mark.story
def test_encoder_classification_of_a_tsv_file(tmp_path: Path, tiny_base: Path) -> None:
    rows = [f"{example.messages[0].content}\t{example.messages[1].content}" for example in colours(60)]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]), encoding="utf-8")
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    own = ("--encoder", str(write_encoder("bert", encoder, tiny_base)), "--data", "train.tsv")
    printed = run("encoder_classification.py", tmp_path, *own, "--steps", "4")

    assert "3 labels" in printed
    assert re.search(r"held-out texts +│ +\d\.\d+ +│ +\d\.\d+", printed)
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nno label here\n", encoding="utf-8")
    assert "train.tsv:2" in run("encoder_classification.py", tmp_path, *own, code=1)


@pytest.mark.model
def test_personal_finetuning_of_smollm2_lowers_the_held_out_loss(tmp_path: Path) -> None:
    printed = run("personal_finetuning.py", tmp_path, "--steps", "4", "--held-out", "4")
    found = re.search(r"loss +│ +(\d+\.\d+) +│ +(\d+\.\d+)", printed)

    assert found is not None
    assert float(found[2]) < float(found[1])
    assert read_peft_folder(tmp_path / "personal-adapter").parameters > 0


@pytest.mark.model
def test_own_dataset_teaches_smollm2_its_sums(tmp_path: Path) -> None:
    losses = re.findall(r"│ +(\d+\.\d+) +│", run("own_dataset.py", tmp_path, "--steps", "5"))

    assert float(losses[-1]) < float(losses[0]) / 2


@pytest.mark.model
@pytest.mark.skipif(not installed(ENCODERS["minilm"].distribution), reason="the package of MiniLM is not installed")
def test_minilm_learns_what_docstrings_are_about(tmp_path: Path) -> None:
    printed = run("encoder_classification.py", tmp_path, "--steps", "20", "--held-out", "80")
    found = re.search(r"held-out texts +│ +(\d\.\d+) +│ +(\d\.\d+)", printed)

    assert found is not None
    assert float(found[1]) < 0.5
    assert float(found[2]) > 0.6
