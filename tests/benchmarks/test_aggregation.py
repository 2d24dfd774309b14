"""The benchmark of aggregation, small: both ways compute the same sum, and its figures are those of that sum."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.aggregation import LAYER, naive, versus
from benchmarks.aggregation_fleet import ranks_of, round_of
from benchmarks.aggregation_round import LLAMA_7B, apart, blocks
from server.scratch import Scratch


def test_the_dense_way_is_the_formula_of_the_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.aggregation.PANEL", 20)
    state, updates = round_of({LAYER: (70, 66)}, 6, 64, Scratch(tmp_path, memory=0))
    whole, s = naive(state, updates)
    total = sum(update.weight for update in updates)
    changes = [(u.weight / total, u.trained[LAYER].product() - u.received[LAYER].product()) for u in updates]
    moved = np.sum([share * change for share, change in changes], axis=0)

    np.testing.assert_allclose(whole, state.adapter[LAYER].product() + moved, atol=1e-5)
    np.testing.assert_allclose(s, np.linalg.svd(whole, compute_uv=False), rtol=1e-4)


def test_both_ways_agree_and_the_excess_is_none_where_the_sum_is_exact() -> None:
    found = versus(96, 3, 1)

    assert abs(found.excess) < 1e-4
    assert found.reported == pytest.approx(1.0, rel=1e-3)
    assert found.bound >= 0.999
    assert (len(found.ours), len(found.naive)) == (2, 1)


def test_a_fleet_has_its_ranks_and_a_model_its_layers() -> None:
    assert ranks_of(6) == [4, 8, 16, 32, 64, 4]
    assert len(blocks(LLAMA_7B, 32)) == 32 * 7


def test_the_peak_of_a_round_is_its_own_and_not_that_of_whoever_asked() -> None:
    """A child that counted by getrusage would show the peak of this process, which has this in memory."""
    large = np.ones(1 << 27)

    assert 10 < apart({LAYER: (64, 64)}, 2)["peak_mb"] < large.nbytes / 1e6
