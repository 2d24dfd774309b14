"""Files that are read in pieces."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.errors import BaseModelError
from profiles.brief import brief
from profiles.byte_source import exactly, local_file, local_files, whole


def test_a_local_file_gives_any_piece_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    source = local_file(tmp_path / "file")

    assert (source.size, source.read(2, 3), source.read(8, 5), source.read(20, 5)) == (10, b"234", b"89", b"")
    assert exactly(source, 5, 5) == b"56789"
    assert whole(source, 10) == b"0123456789"
    with pytest.raises(BaseModelError, match="11 bytes or more; found 10"):
        exactly(source, 6, 5)
    with pytest.raises(BaseModelError, match="at most 9"):
        whole(source, 9)


def test_a_file_that_is_not_there_or_goes_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(BaseModelError, match="No such file"):
        local_file(path)
    path.write_bytes(b"x")
    source = local_file(path)
    path.unlink()
    with pytest.raises(BaseModelError, match="No such file"):
        source.read(0, 1)


def test_a_folder_opens_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"x")
    (tmp_path / "a").mkdir()
    files = local_files(tmp_path)

    assert files.names() == ["a", "b"]
    assert files.open("b", 1) is not None
    assert files.open("a", 1) is None
    with pytest.raises(BaseModelError, match="to list"):
        local_files(tmp_path / "none").names()


def test_a_quoted_value_is_short_and_on_one_line() -> None:
    assert brief("model.layers.11.self_attn.q_proj.weight.quant_state") == (
        "'model.layers.11.self_attn.q_proj.weight.quant_state'"
    )
    for hostile in ("a\nb" * 1000, ["\n"] * 1000, 10**4000, {str(key): key for key in range(1000)}):
        assert len(brief(hostile)) < 200
        assert "\n" not in brief(hostile)
