"""`edge-runtime profile`: plans for this and other machines, explained, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.product import Launcher

pytestmark = pytest.mark.story

CARD = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
PLAN = ("profile", "--as-device", "raspberry-pi-5", "--base", "base")


@pytest.fixture
def base(product: Launcher) -> Path:
    folder = product.folder / "base"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CARD))
    return folder


@pytest.mark.usefixtures("base")
def test_an_explained_plan_shows_where_memory_and_time_go(product: Launcher) -> None:
    code, out, err = product.run(*PLAN, "--explain")

    assert (code, err) == (0, "")
    for words in ("the plan for base", "134.5 million parameters", "predicted peak", "base weights", "products"):
        assert words in out


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize("flags", [(), ("--precision", "nf4", "--set", "adapter.regained=16")])
def test_for_machines_the_parts_add_up_to_the_plan(product: Launcher, flags: tuple[str, ...]) -> None:
    code, out, _ = product.run(*PLAN, "--json", *flags)
    found = json.loads(out)

    assert code == 0
    assert sum(found["memory"].values()) == found["plan"]["predicted_peak_bytes"]
    assert sum(found["seconds"].values()) == pytest.approx(found["plan"]["predicted_step_seconds"])
    assert found["card"]["parameters"] == 134_515_008


@pytest.mark.usefixtures("base")
def test_flags_and_budgets_are_honoured(product: Launcher) -> None:
    flags = ("--rank", "4", "--held", "8", "--layers", "5", "--precision", "nf4", "--set", "device.micro_batch=2")
    code, out, _ = product.run(*PLAN, "--json", *flags)
    plan = json.loads(out)["plan"]

    assert code == 0
    assert [plan[key] for key in ("rank", "held", "layers_trained", "precision", "micro_batch")] == [4, 8, 5, "nf4", 2]

    _, out, _ = product.run(*PLAN, "--json", "--set", "device.round_bytes=500000")
    assert json.loads(out)["plan"]["predicted_round_bytes"] <= 500_000


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--rank", "0"), 2, "rank is a whole number of at least 1; found 0"),
        (("--precision", "3-bit"), 2, "'3-bit'"),
        (("--rank", "64"), 2, "rank is between 1 and 16"),
        (("--set", "device.precision=int3"), 2, "precision"),
        (("--set", "device.rank=0"), 2, "device.rank"),
        (("--set", "device.round_seconds=0.001"), 10, "would take"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(product: Launcher, flags: tuple[str, ...], code: int, said: str) -> None:
    ended, out, err = product.run(*PLAN, *flags)

    assert (ended, out) == (code, "")
    assert len(err.splitlines()) == 1
    assert said in err


def test_a_device_file_of_ones_own_is_read_and_its_mistakes_are_named(product: Launcher) -> None:
    code, out, _ = product.run("profile", "--as-device", "raspberry-pi-5", "--json")
    assert code == 0
    file = product.folder / "own.toml"
    file.write_text('kind = "cpu"\nphysical_cores = -4\n')
    code, out, err = product.run("profile", "--as-device", "own.toml")

    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "own.toml" in err


def test_an_unknown_base_lists_the_nearest(product: Launcher) -> None:
    code, _, err = product.run("profile", "--as-device", "raspberry-pi-5", "--base", "SmolLM2-135")

    assert code != 0
    assert len(err.splitlines()) == 1
    assert "SmolLM2-135M" in err


def test_a_truncated_gguf_file_is_one_line(product: Launcher) -> None:
    (product.folder / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x10")
    code, _, err = product.run("profile", "--as-device", "raspberry-pi-5", "--base", "cut.gguf")

    assert code != 0
    assert len(err.splitlines()) == 1
    assert "cut.gguf" in err
