"""The demo's picture."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.demo import plot
from edge_runtime.demo.board import bytes_as_fp32
from edge_runtime.wire.messages import Message
from tests.demo.fleet import board_of, life

pytest.importorskip("matplotlib")


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its header."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-12:] == b"\x00\x00\x00\x00IEND\xaeB`\x82"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def drawn(lives: dict[str, list[Message]], truncation: list[tuple[int, float]], path: Path) -> Path:
    """The picture of what these devices said."""
    board = board_of(lives)
    plot.draw(board, truncation, bytes_as_fp32(board), path, "a fleet")
    return path


LIVES = {name: life(name, rank=rank) for name, rank in (("laptop", 4), ("nano", 2), ("pi", 1))}

CUT: dict[str, tuple[dict[str, list[Message]], list[tuple[int, float]]]] = {
    "no personal losses, no truncation": ({name: life(name, personal=None) for name in LIVES}, []),
    "one device that measured nothing, merges that lost nothing": ({"pi": life("pi")[:2]}, [(1, 0.0)]),
    "nobody": ({}, []),
    "more devices than colours, merges that lost most": (
        {f"device-{index}": life(f"device-{index}") for index in range(9)},
        [(1, 0.9), (2, 0.0)],
    ),
}


def test_the_picture_is_a_png_of_a_size_that_can_be_read(tmp_path: Path) -> None:
    path = drawn(LIVES, [(1, 0.01), (2, 0.004)], tmp_path / "demo.png")
    width, height = size_of(path)

    assert 1200 <= width <= 3000
    assert 500 <= height <= 1500
    assert 20_000 < path.stat().st_size < 1_000_000


@pytest.mark.parametrize("case", CUT)
@pytest.mark.filterwarnings("ignore:No artists with labels")
def test_a_fleet_that_is_not_as_usual_is_drawn_as_far_as_it_went(tmp_path: Path, case: str) -> None:
    lives, truncation = CUT[case]

    assert min(size_of(drawn(lives, truncation, tmp_path / "demo.png"))) > 500


def test_every_device_has_a_line_however_many_there_are() -> None:
    """There are seven colours; the eighth device begins them anew."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - belongs to an extra

    names = [f"device-{index}" for index in range(len(plot.COLOURS) + 2)]
    axis = Figure().subplots()
    plot._losses(axis, board_of({name: life(name) for name in names}))
    legend = axis.get_legend()

    assert legend is not None
    assert [text.get_text().split(":")[0] for text in legend.get_texts()] == names


def test_a_line_goes_from_the_base_over_the_versions_to_the_personal_adapter() -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415 - belongs to an extra

    axis = Figure().subplots()
    plot._losses(axis, board_of({"pi": life("pi")}))
    points = [
        (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()) for line in axis.get_lines()
    ]

    assert points == [([0, 1, 2], [4.0, 3.5, 3.0]), ([2, 2.5], [3.0, 1.0]), ([2.5], [1.0])]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["base", "v1", "v2", "personal"]
