"""What `--base` may name, and what makes two bases the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime.errors import BaseModelError, UnknownBaseError
from tests.train.conftest import BuildTinyBase

pytestmark = pytest.mark.torch
huggingface_hub = pytest.importorskip("huggingface_hub")
source = pytest.importorskip("edge_runtime.train.source")


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_a_folder_and_a_gguf_file_are_named_by_their_path(tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "some-base.Q4_0.gguf"
    file.write_bytes(b"GGUF")

    assert source.resolve(str(tiny_base)) == source.Source("folder", tiny_base, tiny_base.name)
    assert source.resolve(str(file)) == source.Source("gguf", file, "some-base.Q4_0")


@pytest.mark.model
def test_the_alias_finds_the_weights_in_the_package() -> None:
    found = source.resolve("smollm2")

    assert (found.kind, found.label) == ("gguf", "SmolLM2-135M-Instruct")
    assert found.path.stat().st_size == 98_362_432


@pytest.mark.parametrize("spec", ["", "nothing", "no/such/folder", "no/such.gguf", "/no/such"])
def test_what_is_nothing_is_an_error_that_says_what_a_base_can_be(spec: str) -> None:
    with pytest.raises(UnknownBaseError, match=r"alias \(smollm2\), a Hugging Face folder, a \.gguf file or a hub id"):
        source.resolve(spec)


def test_a_folder_that_is_no_base_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(UnknownBaseError, match=r"to hold config\.json; found none"):
        source.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UnknownBaseError, match="found no weights"):
        source.resolve(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnknownBaseError, match="found pickled weights only"):
        source.resolve(str(tmp_path))


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], Path]:
    """A hub cache of its own, no network, and a function that puts a folder into the cache under a hub id."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(hub_id: str, folder: Path) -> Path:
        revision = "0123456789abcdef0123456789abcdef01234567"
        model = cache / f"models--{hub_id.replace('/', '--')}"
        (model / "refs").mkdir(parents=True)
        (model / "refs" / "main").write_text(revision, encoding="ascii")
        return copied(folder, model / "snapshots" / revision)

    return put


def test_a_hub_model_that_is_cached_needs_no_network(tiny_base: Path, offline_hub: Callable[[str, Path], Path]) -> None:
    snapshot = offline_hub("someone/tiny", tiny_base)

    found = source.resolve("someone/tiny")

    assert found == source.Source("hub", snapshot, "someone/tiny")
    assert source.fingerprint(found) == source.fingerprint(source.resolve(str(tiny_base)))


def test_a_hub_model_out_of_reach_says_what_was_tried(
    tmp_path: Path, tiny_base: Path, offline_hub: Callable[[str, Path], Path]
) -> None:
    partial = copied(tiny_base, tmp_path / "partial")
    (partial / "model.safetensors").unlink()
    offline_hub("someone/partly-cached", partial)

    for hub_id in ("someone/absent", "someone/partly-cached"):
        with pytest.raises(UnknownBaseError, match=rf"'{hub_id}'.*(tried the folder.*the hub|no weights)"):
            source.resolve(hub_id)


def test_a_folder_wins_over_a_hub_id(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied(tiny_base, tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)

    assert source.resolve("owner/name").kind == "folder"


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_the_fingerprint_is_of_weights_and_architecture_only(
    tiny_base: Path, tmp_path: Path, build_tiny_base: BuildTinyBase
) -> None:
    def print_of(folder: Path) -> str:
        return str(source.fingerprint(source.resolve(str(folder))))

    same, other_rope, other_weights = (copied(tiny_base, tmp_path / name) for name in ("same", "rope", "weights"))
    edit_config(same, transformers_version="9.9", use_cache=False, dtype="float16", eos_token_id=[2, 0])
    (same / "tokenizer.json").unlink()
    edit_config(other_rope, rope_theta=500000.0, rope_parameters={"rope_theta": 500000.0})
    with (other_weights / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")

    assert print_of(same) == print_of(tiny_base)
    assert (
        len({print_of(folder) for folder in (tiny_base, other_rope, other_weights, build_tiny_base(tied=False))}) == 4
    )


def test_a_kept_digest_is_used_until_the_file_changes(tmp_path: Path) -> None:
    file, memo = tmp_path / "base.gguf", tmp_path / "memo"
    file.write_bytes(b"GGUF one")
    base = source.resolve(str(file))

    first = source.fingerprint(base, memo=memo)

    assert first == source.fingerprint(base) == source.fingerprint(base, memo=memo)
    (note,) = memo.iterdir()
    note.write_text("0" * 64, encoding="ascii")
    assert source.fingerprint(base, memo=memo) == "0" * 64
    note.write_text("torn", encoding="ascii")
    assert source.fingerprint(base, memo=memo) == first
    file.write_bytes(b"GGUF one more")
    assert source.fingerprint(base, memo=memo) == source.fingerprint(base) != first


def test_an_index_that_names_a_missing_file_is_an_error(tiny_base: Path, tmp_path: Path) -> None:
    folder = copied(tiny_base, tmp_path / "sharded")
    index = {"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    shutil.copy(folder / "model.safetensors", folder / "model-00001.safetensors")

    with pytest.raises(BaseModelError, match=r"model-00002\.safetensors; found no such file"):
        source.weight_files(folder)


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_a_configuration_that_is_no_object_is_an_error(tiny_base: Path, tmp_path: Path, content: str) -> None:
    folder = copied(tiny_base, tmp_path / "broken")
    (folder / "config.json").write_text(content, encoding="utf-8")

    with pytest.raises(BaseModelError, match=r"expected a JSON object in .*config\.json"):
        source.fingerprint(source.resolve(str(folder)))
