"""The benchmark of slices: what it holds against what, and how sure it says to be."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks import slices
from benchmarks.slices_fleet import Round, Way

pytestmark = pytest.mark.torch


def lives(*losses: float) -> list[list[Round]]:
    return [[Round(9.0, 0.1, 1), Round(loss, 0.5, 1)] for loss in losses]


def test_the_interval_is_students() -> None:
    """Of 1, 2, 3: t(0.975, 2) times 1 / sqrt(3)."""
    assert slices.interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(slices.interval([1.0]))


def test_a_way_is_held_against_the_default_in_the_same_layers_and_seeds() -> None:
    everywhere = slices.SPECTRUM_EVERYWHERE
    found = {
        slices.TOP: lives(2.0, 4.0),
        slices.SPECTRUM: lives(1.0, 4.0),
        everywhere.plain: lives(8.0, 8.0),
        everywhere: lives(4.0, 4.0),
    }
    told = slices.figures(found)

    assert told["allocation_vs_uniform"] == 1.5, "the mean of 2 / 1 and 4 / 4, and not 6 / 5"
    assert told["allocation_vs_uniform_every_linear"] == 2.0
    assert "top_vs_best" not in told
    assert everywhere.plain == Way(every_linear=True)


def test_the_default_is_held_against_the_best_of_the_others() -> None:
    worst, middle, best = slices.POLICIES
    told = slices.figures({slices.TOP: lives(2.0), worst: lives(8.0), middle: lives(4.0), best: lives(1.0)})

    assert (told["top_vs_best"], told["best_other"], told["top_vs_best_95"]) == (0.5, best.slice, None)
