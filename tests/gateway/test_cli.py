"""The verb refuses what can be known to be wrong, in one line, before anything is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime import cli


def verb(folder: Path, site: str, above: str, *more: str) -> int:
    (folder / "site.toml").write_text(site, encoding="utf-8")
    (folder / "above.toml").write_text(above, encoding="utf-8")
    return cli.run(["gateway", "-c", str(folder / "site.toml"), "--upstream", str(folder / "above.toml"), *more])


def test_a_gateway_stands_between_two_fleets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(tmp_path, '[fleet]\nname = "x"', '[fleet]\nname = "x"') == 2
    assert "both files name 'x'" in capsys.readouterr().err


def test_a_site_has_increments_to_sum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(tmp_path, '[fleet]\nname = "x"', "", "--set", "aggregator.method=svd") == 2
    assert "a gateway sums increments" in capsys.readouterr().err


def test_the_fleet_above_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["gateway"]) == 2
    assert "--upstream" in capsys.readouterr().err
