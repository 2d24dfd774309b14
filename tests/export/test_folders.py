"""Output folders are whole or not there, whenever a run is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.errors import ExportError
from export import folders, origin


class Killed(BaseException):
    """The process ends here, whatever is on the disk."""


def filled(folder: Path, text: str = "old") -> Path:
    """An export that is there."""
    folder.mkdir(parents=True)
    (folder / origin.FILE).write_text(text)
    return folder


def half_written(part: Path) -> None:
    (part / "half").write_text("x")
    raise RuntimeError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_is_there_before_all_of_it_is(tmp_path: Path) -> None:
    with folders.writing(tmp_path / "a" / "peft", force=False) as part:
        (part / "sub").mkdir()
        (part / "sub" / "file").write_text("x")
        assert not (tmp_path / "a" / "peft").exists()

    assert (tmp_path / "a" / "peft" / "sub" / "file").read_text() == "x"
    assert names(tmp_path / "a") == ["peft"]


def test_what_fails_leaves_the_old_and_nothing_else(tmp_path: Path) -> None:
    filled(tmp_path / "peft")
    with pytest.raises(RuntimeError), folders.writing(tmp_path / "peft", force=True) as part:
        half_written(part)

    assert names(tmp_path) == ["peft"]
    assert (tmp_path / "peft" / origin.FILE).read_text() == "old"


def test_a_half_written_folder_of_a_killed_run_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".peft.part").mkdir()
    (tmp_path / ".peft.part" / "half").write_text("x")
    with folders.writing(tmp_path / "peft", force=False) as part:
        (part / "whole").write_text("y")

    assert names(tmp_path) == ["peft"]
    assert names(tmp_path / "peft") == ["whole"]


def test_an_existing_export_is_replaced_only_by_force_and_as_a_whole(tmp_path: Path) -> None:
    filled(tmp_path / "peft")
    (tmp_path / "peft" / "stale").write_text("x")
    with pytest.raises(ExportError, match="--force"):
        folders.check_free(tmp_path / "peft", force=False)
    with folders.writing(tmp_path / "peft", force=True) as part:
        (part / origin.FILE).write_text("new")

    assert names(tmp_path / "peft") == [origin.FILE]
    assert (tmp_path / "peft" / origin.FILE).read_text() == "new"


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_export_is_never_replaced(tmp_path: Path, *, force: bool) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("home", "file"):
        with pytest.raises(ExportError, match="something else"):
            folders.check_free(tmp_path / name, force=force)
    (tmp_path / "empty").mkdir()
    folders.check_free(tmp_path / "empty", force=force)


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path / "peft")
    rename = Path.replace

    def killed_on_the_second(self: Path, target: Path) -> Path:
        if self.name == ".peft.part":
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", killed_on_the_second)
    with pytest.raises(Killed), folders.writing(tmp_path / "peft", force=True) as part:
        (part / origin.FILE).write_text("new")
    monkeypatch.undo()
    assert not (tmp_path / "peft").exists()

    with pytest.raises(ExportError, match="--force"):
        folders.check_free(tmp_path / "peft", force=False)
    assert (tmp_path / "peft" / origin.FILE).read_text() == "old"
    assert names(tmp_path) == ["peft"]


def test_a_folder_that_was_moved_away_stays_where_it_is(tmp_path: Path) -> None:
    with folders.writing(tmp_path / "peft", force=False) as part:
        (part / "file").write_text("x")
        kept = folders.keep_as(part, tmp_path / "peft", "refused")

    assert kept == tmp_path / "peft.refused"
    assert names(tmp_path) == ["peft.refused"]


def test_a_place_that_cannot_be_written_is_an_export_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match="cannot write"), folders.writing(tmp_path / "file" / "peft", force=False):
        pass
