"""`edge-runtime export` and `edge-runtime chat`, from a folder to the words that a person reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from edge_runtime.cli import run  # noqa: E402 - after the check that torch is there
from edge_runtime.lora.files import read_peft_folder, write_peft_folder  # noqa: E402 - as above
from edge_runtime.train.base import prepare  # noqa: E402 - as above
from export import origin  # noqa: E402 - as above
from export.origin import Origin  # noqa: E402 - as above
from tests.export.subjects import TRACES  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above

pytestmark = pytest.mark.torch

ADAPTER = tiny.random_adapter(tiny.MIXED)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("EDGE_RUNTIME_CACHE", str(folder))
    return folder


@pytest.fixture
def given(tiny_base: Path, tmp_path: Path) -> Path:
    """A folder of PEFT's, as anybody may have made it."""
    folder = tmp_path / "given"
    write_peft_folder(ADAPTER, folder, base_name=str(tiny_base), scaling=2.0)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_any_folder_leaves_in_several_formats_each_verified(
    given: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code = run(["export", "--peft", str(given), "--out", str(out), "--format", "peft,native", "--json"])
    told = json.loads(capsys.readouterr().out)

    assert code == 0
    assert names(out) == ["native", "peft"]
    assert read_peft_folder(out / "peft").digest() == ADAPTER.digest()
    for name in ("peft", "native"):
        assert told[name]["good"] is True
        assert told[name]["max_logit_diff"] <= 1e-4
        assert told[name]["folder"] == str(out / name)
        about = origin.read(out / name)
        assert about is not None
        assert about.base == tiny_base.name
        assert len(about.fingerprint) == 64


def test_without_verification_a_server_needs_no_base(given: Path, tmp_path: Path, cache: Path) -> None:
    assert run(["export", "--peft", str(given), "--out", str(tmp_path / "out"), "--no-verify"]) == 0
    assert names(tmp_path / "out" / "peft") == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "origin.json",
    ]  # fmt: skip
    assert not list(cache.iterdir())


def test_an_adapter_of_another_base_is_refused_before_anything_is_written(
    given: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its layers fit, so that only the fingerprint tells."""
    other = prepare(str(tiny_base), precision="bf16", cache=tmp_path / "c").fingerprint
    origin.write(Origin(base="org/theirs", fingerprint="0" * 64), given)
    arguments = ["--peft", str(given), "--out", str(tmp_path / "out"), "--base", str(tiny_base)]

    assert run(["export", *arguments]) == 11
    line = capsys.readouterr().err.splitlines()[-1]
    assert other[:16] in line
    assert "0" * 16 in line
    assert not (tmp_path / "out").exists()
    assert run(["chat", "--adapter", str(given), "--base", str(tiny_base), "--prompt", "x"]) == 11


def test_what_exists_is_refused_before_anything_is_computed_and_replaced_by_force(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", "--peft", str(given), "--out", str(tmp_path / "out"), "--no-verify"]
    assert run(arguments) == 0
    assert run([*arguments, "--format", "native,peft"]) == 15
    assert "--force" in capsys.readouterr().err
    assert names(tmp_path / "out") == ["peft"]
    assert run([*arguments, "--format", "native,peft", "--force"]) == 0
    assert names(tmp_path / "out") == ["native", "peft"]


def test_a_format_that_cannot_hold_the_adapter_stops_all_before_anything_is_written(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((given / "adapter_config.json").read_text())
    (given / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))

    assert run(["export", "--peft", str(given), "--out", str(tmp_path / "out"), "--format", "native"]) == 15
    assert "use_dora" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_prompts_of_a_file_are_compared_on_and_an_empty_one_is_an_error(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("def dump(\n\nreturn json\n")
    (tmp_path / "none.txt").write_text("\n")
    arguments = ["export", "--peft", str(given), "--out", str(tmp_path / "out"), "--json"]

    assert run([*arguments, "--prompts", str(tmp_path / "prompts.txt")]) == 0
    captured = capsys.readouterr()
    assert "2 prompts" in captured.err
    assert json.loads(captured.out)["peft"]["greedy_tokens"] == 2 * 16
    assert run([*arguments, "--prompts", str(tmp_path / "none.txt"), "--force"]) == 12
    assert names(tmp_path / "out") == ["peft"]


def test_held_out_examples_of_the_device_are_compared_on_where_its_file_names_its_data(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"say {n}", "completion": f"{n} it is"} for n in range(8)]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["--set", f"device.data={tmp_path / 'my.jsonl'}"]

    assert run(["export", "--peft", str(given), "--out", str(tmp_path / "out"), *data]) == 0
    assert "held out of this device's data" in capsys.readouterr().err


def test_a_base_that_nobody_names_is_asked_for(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((given / "adapter_config.json").read_text())
    (given / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": ""}))

    assert run(["export", "--peft", str(given), "--out", str(tmp_path / "out")]) == 15
    assert "--base" in capsys.readouterr().err


# ── chat ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_prompt_is_answered_by_base_and_adapter(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the base answers the same whatever stands beside it."""
    other = tmp_path / "other"
    config = json.loads((given / "adapter_config.json").read_text())
    write_peft_folder(
        tiny.random_adapter(tiny.MIXED, seed=1), other, base_name=config["base_model_name_or_path"], scaling=2.0
    )
    arguments = ["--prompt", "def dump(", "--max-tokens", "6", "--json"]
    assert run(["chat", "--adapter", str(given), *arguments]) == 0
    first = json.loads(capsys.readouterr().out)
    assert run(["chat", "--adapter", str(other), *arguments]) == 0
    second = json.loads(capsys.readouterr().out)

    assert first.keys() == second.keys() == {"base", "personal"}
    assert first["base"] == second["base"]
    assert len({first["base"], first["personal"], second["personal"]}) == 3


def test_a_talk_goes_on_until_its_end_and_shows_both_sides(
    given: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(["def dump(", "", "/new", "[red]", "/quit"])
    monkeypatch.setattr("rich.console.Console.input", lambda *_args, **_named: next(typed))

    assert run(["chat", "--adapter", str(given), "--max-tokens", "4"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("base") == shown.count("personal") == 2
    assert list(typed) == []


def test_a_folder_without_an_export_for_the_engine_is_named(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "--gguf", str(given), "--prompt", "x"]) == 15
    assert "adapter.gguf or model.gguf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "flag", "needs"),
    [("onnx", "--onnx", "optimum"), ("onnx-adapter", "--onnx", "optimum"), ("gguf", "--gguf", "xllamacpp")],
)
def test_an_exported_adapter_answers_in_its_engine_as_it_does_here(
    given: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, flag: str, needs: str
) -> None:
    """Verified first; in float32, where another order of the same sums changes no token."""
    pytest.importorskip(needs)
    if needs == "optimum" and not TRACES:
        pytest.skip("optimum-onnx needs transformers below 4.58")
    base = ["--base", str(tiny_base), "--precision", "fp32"]
    words = ["--prompt", "def dump(", "--max-tokens", "6", "--json", *base]
    assert run(["export", "--peft", str(given), "--out", str(tmp_path / "out"), "--format", form, *base]) == 0
    capsys.readouterr()
    assert run(["chat", "--adapter", str(given), *words]) == 0
    here = json.loads(capsys.readouterr().out)
    assert run(["chat", flag, str(tmp_path / "out" / form), *words]) == 0
    there = json.loads(capsys.readouterr().out)

    assert here == there
