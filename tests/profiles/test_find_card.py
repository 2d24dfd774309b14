"""Whatever `--base` may name becomes a card, or one clear line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.errors import BaseModelError, UnknownBaseError
from profiles.card import card_from_config
from profiles.find_card import find_card
from profiles.known_bases import known_card
from tests.profiles.hub_server import Hub, serving
from tests.profiles.model_files import shapes_of, tiny_config, tiny_gguf, weights, write_folder

ROOT = Path(__file__).parents[2]
PARAMETERS = card_from_config(tiny_config()).parameters
MODEL = {"config.json": json.dumps(tiny_config()).encode(), **weights(shapes_of(tiny_config()))}
SHARDED = {"config.json": json.dumps(tiny_config()).encode(), **weights(shapes_of(tiny_config()), 3)}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on loopback, and an empty cache."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("no_proxy", "*")
    with serving() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        yield found


def refused(spec: str, *, online: bool = True) -> str:
    with pytest.raises(UnknownBaseError) as caught:
        find_card(spec, online=online)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def cached(tmp_path: Path, hub_id: str, files: dict[str, bytes]) -> None:
    folder = tmp_path / "huggingface" / "hub" / f"models--{hub_id.replace('/', '--')}" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def test_a_folder_and_a_gguf_file_give_their_cards(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "My-Model", tiny_config())
    (tmp_path / "other.gguf").write_bytes(tiny_gguf("qwen2"))

    assert find_card(str(folder)).name == "My-Model"
    assert find_card(str(folder)).stored_bytes == 2 * PARAMETERS
    assert find_card(str(tmp_path / "other.gguf")).model_type == "qwen2"


@pytest.mark.model
def test_the_alias_is_the_packaged_model() -> None:
    card = find_card("smollm2")

    assert (card.name, card.parameters, card.stored_dtype) == ("SmolLM2-135M-Instruct", 134_515_008, "q4_1")


@pytest.mark.parametrize("spec", ["Qwen3-4B", "qwen3-4b", "Llama-3.2-1B-Instruct"])
def test_a_well_known_name_needs_no_file(spec: str) -> None:
    assert find_card(spec) == known_card(spec)


def test_files_win_over_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "Qwen3-4B", tiny_config())
    write_folder(tmp_path / "Qwen" / "Qwen3-8B", tiny_config())

    assert find_card("Qwen3-4B").parameters == PARAMETERS
    assert find_card("Qwen/Qwen3-8B").parameters == PARAMETERS


def test_a_model_on_the_hub_costs_its_headers(hub: Hub) -> None:
    hub.add("owner/model", MODEL)
    card = find_card("owner/model")

    assert (card.name, card.parameters, card.stored_bytes) == ("owner/model", PARAMETERS, 2 * PARAMETERS)
    assert hub.sent < len(MODEL["model.safetensors"]) - 2 * PARAMETERS + len(MODEL["config.json"]) + 10
    assert hub.url in card.origin


def test_each_shard_on_the_hub_costs_its_header(hub: Hub) -> None:
    hub.add("owner/model", SHARDED)

    assert find_card("owner/model").stored_bytes == 2 * PARAMETERS
    assert hub.sent < sum(map(len, SHARDED.values())) - 2 * PARAMETERS + 50


def test_a_hub_without_ranges_serves_as_well(hub: Hub) -> None:
    hub.ranges = False
    hub.add("owner/model", SHARDED)

    assert find_card("owner/model").parameters == PARAMETERS


def test_the_only_gguf_file_of_a_model_is_taken_and_of_several_one_must_be_named(hub: Hub) -> None:
    content = tiny_gguf(vocab_size=30_000)
    hub.add("owner/model", {"a-Q4.gguf": content})
    hub.files["/api/models/owner/model"] = json.dumps({"siblings": [{"rfilename": "a-Q4.gguf"}]}).encode()

    assert find_card("owner/model").vocab_size == 30_000
    assert hub.sent < len(content) - 30_000 * 32
    hub.add("owner/model", {"b-Q8.gguf": tiny_gguf()})
    names = [{"rfilename": "README.md"}, {"rfilename": "a-Q4.gguf"}, {"rfilename": "b-Q8.gguf"}]
    hub.files["/api/models/owner/model"] = json.dumps({"siblings": names}).encode()
    assert "owner/model/a-Q4.gguf" in refused("owner/model")
    assert find_card("owner/model/b-Q8.gguf").parameters == PARAMETERS
    assert "check the name" in refused("owner/model/c-Q2.gguf")


def test_what_the_cache_holds_is_not_fetched(hub: Hub, tmp_path: Path) -> None:
    cached(tmp_path, "owner/model", SHARDED)

    assert find_card("owner/model").stored_bytes == 2 * PARAMETERS
    assert hub.asked == []
    assert find_card("owner/model", cache=tmp_path / "huggingface" / "hub", online=False).parameters == PARAMETERS


def test_a_cache_without_the_weights_is_filled_up_from_the_hub_or_believed_offline(hub: Hub, tmp_path: Path) -> None:
    cached(tmp_path, "owner/model", {"config.json": MODEL["config.json"]})
    hub.add("owner/model", MODEL)

    assert find_card("owner/model").stored_bytes == 2 * PARAMETERS
    assert find_card("owner/model", online=False).parameters == PARAMETERS
    assert find_card("owner/model", online=False).stored_bytes == 0


@pytest.mark.parametrize("how", ["argument", "variable"])
def test_offline_the_hub_is_not_asked(hub: Hub, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/model", MODEL)
    if how == "variable":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    assert "go online" in refused("owner/model", online=how == "variable")
    assert hub.asked == []


def test_a_model_that_the_hub_lacks_or_refuses_is_one_line(hub: Hub) -> None:
    assert "none of that name" in refused("owner/model")
    assert "nearest: SmolLM2-135M" in refused("owner/SmolLM2-135")
    hub.status = 401
    assert "HF_TOKEN" in refused("owner/model")
    hub.status = 403
    assert "HF_TOKEN" in refused("owner/model")


def test_the_token_is_shown_to_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    hub.add("owner/model", MODEL)
    find_card("owner/model")

    assert {sent for _, _, sent in hub.asked} == {"Bearer hf_secret"}


def test_a_well_known_model_needs_no_hub(hub: Hub) -> None:
    hub.status = 403
    card = find_card("meta-llama/Llama-3.2-1B")

    assert card.parameters == known_card("Llama-3.2-1B").parameters
    assert card.name == "meta-llama/Llama-3.2-1B"
    assert "table" in card.origin


def test_bad_files_on_the_hub_are_not_covered_up(hub: Hub) -> None:
    """The table stands in for what cannot be read, not for what is wrong."""
    hub.add("meta-llama/Llama-3.2-1B", {**MODEL, "model.safetensors": MODEL["model.safetensors"][:-1]})

    with pytest.raises(BaseModelError, match="fetch it again"):
        find_card("meta-llama/Llama-3.2-1B")


def test_a_misspelt_name_lists_what_is_near(tmp_path: Path) -> None:
    write_folder(tmp_path / "my-base", tiny_config())
    (tmp_path / "tiny-llama.gguf").write_bytes(tiny_gguf())

    assert "nearest: smollm2" in refused("smolm2")
    assert "nearest: Qwen2.5-0.5B" in refused("Qwen25-0.5B")
    assert str(tmp_path / "my-base") in refused(str(tmp_path / "my-bases"))
    assert str(tmp_path / "tiny-llama.gguf") in refused(str(tmp_path / "tiny-lama.gguf"))
    assert "well-known: smollm2, SmolLM2-135M" in refused("~~~~~~~~")


def test_a_folder_without_a_configuration_and_another_file_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")

    assert "a folder without config.json" in refused(str(tmp_path))
    assert "not a .gguf" in refused(str(tmp_path / "model.bin"))


@pytest.mark.parametrize(
    "spec", ["", " ", "/", "..", "~nobody-here/x", "a\0b", "x" * 5000, "a/" * 300, "two\nlines", "../x.gguf", "a/.."]
)
def test_no_name_is_too_odd_for_one_line(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert len(refused(spec, online=False)) < 1200


def test_a_configuration_that_is_a_link_to_itself_is_none(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "base", tiny_config())
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")

    assert "without config.json" in refused(str(folder))


def test_finding_a_card_loads_no_library_of_training(tmp_path: Path) -> None:
    write_folder(tmp_path / "base", tiny_config())
    (tmp_path / "tiny.gguf").write_bytes(tiny_gguf())
    code = (
        "import sys\n"
        "from profiles.find_card import find_card\n"
        "for spec in sys.argv[1:]: find_card(spec)\n"
        "print(sorted({'torch', 'transformers', 'gguf', 'huggingface_hub', 'safetensors', 'numpy'} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "base"), str(tmp_path / "tiny.gguf"), "Qwen3-4B"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

    assert ended.stdout == "[]\n"
