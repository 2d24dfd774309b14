"""Where the files of hub models are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_runtime.errors import UnknownBaseError
from profiles.hub import cache_folder, is_offline, remote_files, snapshot

VARIABLES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "XDG_CACHE_HOME",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
)


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def snapshots(cache: Path, *commits: str) -> Path:
    model = cache / "models--owner--name"
    for age, commit in enumerate(commits):
        folder = model / "snapshots" / commit
        folder.mkdir(parents=True)
        os.utime(folder, (1_000_000 + age, 1_000_000 + age))
    return model


def test_the_revision_main_is_taken_else_the_newest(tmp_path: Path) -> None:
    model = snapshots(tmp_path, "aaa", "bbb", "ccc")
    assert snapshot("owner/name", tmp_path) == model / "snapshots" / "ccc"
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("bbb\n")
    assert snapshot("owner/name", tmp_path) == model / "snapshots" / "bbb"
    (model / "refs" / "main").write_text("../../outside")
    (tmp_path / "outside").mkdir()
    assert snapshot("owner/name", tmp_path) == model / "snapshots" / "ccc"
    assert snapshot("owner/other", tmp_path) is None


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "~/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x", "HF_HOME": "~/h"}, "~/h/hub"),
        ({"HF_HOME": "/h", "HF_HUB_CACHE": "/c"}, "/c"),
        ({"HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
    ],
)
def test_the_cache_lies_where_the_hubs_library_keeps_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert cache_folder() == Path(expected).expanduser()


@pytest.mark.torch
def test_the_hubs_library_agrees_on_the_cache() -> None:
    library = pytest.importorskip("huggingface_hub")
    if any(os.environ.get(name) for name in VARIABLES):
        pytest.skip("the library read the environment before this test emptied it")

    assert str(cache_folder()) == library.constants.HF_HUB_CACHE


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("true", True), ("ON", True), ("0", False), ("", False)])
def test_the_network_can_be_forbidden(monkeypatch: pytest.MonkeyPatch, value: str, offline: bool) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)

    assert is_offline() is offline


@pytest.mark.parametrize("endpoint", ["huggingface.co", "file:///etc", "https://", "http://a b"])
def test_an_endpoint_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)

    with pytest.raises(UnknownBaseError, match="HF_ENDPOINT"):
        remote_files("owner/name")


def test_a_token_that_is_none_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret\nX-Other: 1")

    with pytest.raises(UnknownBaseError, match="HF_TOKEN") as caught:
        remote_files("owner/name")
    assert "secret" not in str(caught.value)
