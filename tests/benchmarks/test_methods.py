"""The comparison of methods: rates are chosen, lives are kept, and wins are counted as its text says."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks.methods import Runner, batches, figures, finalists, tuned
from benchmarks.methods_fleet import SMALLEST, Life, Rate
from benchmarks.methods_lives import Order, Place
from benchmarks.methods_settings import EQUAL, OURS, RIVALS, SAME, SETTINGS, WAYS, falling
from server import aggregators

pytestmark = pytest.mark.torch

FIRST = Order("pilot", OURS.name, 0, 2e-3, 0.0, 3, 8)


def life(loss: float, personal: float = 9.0) -> Mapping[str, Any]:
    """A life as its process tells it."""
    point = {"loss": loss, "accuracy": 0.5}
    return {
        "rounds": {"3": point}, "devices": point, "personal": {"loss": personal, "accuracy": 0.5},
        "numbers_up": 1, "numbers_down": 1, "merge_seconds": 0.1,
    }  # fmt: skip


def test_the_rate_with_the_lowest_loss_is_taken_and_one_that_diverged_is_none() -> None:
    found = {replace(FIRST, rate=rate): life(loss) for rate, loss in ((1e-3, 0.5), (2e-3, 0.4), (4e-3, math.nan))}
    assert tuned(found) == {OURS.name: Rate(2e-3, 0.0)}


def test_a_method_without_a_global_model_is_judged_by_the_personal_ones() -> None:
    way = next(name for name in WAYS if name.startswith("fedsa"))
    found = {replace(FIRST, way=way, rate=rate): life(1.0, personal) for rate, personal in ((1e-3, 0.5), (2e-3, 0.7))}
    assert tuned(found) == {way: Rate(1e-3, 0.0)}


@pytest.mark.parametrize(
    ("theirs", "wins"), [((0.8, 0.81, 0.82), 1.0), ((0.5, 0.8, 1.1), 0.0), ((0.1, 0.11, 0.12), 0.0)]
)
def test_a_win_needs_intervals_that_do_not_overlap(theirs: tuple[float, ...], wins: float) -> None:
    rival = RIVALS[0]
    lives = {replace(FIRST, seed=seed): life(0.5 + seed / 100) for seed in range(3)}
    lives |= {replace(FIRST, way=rival.name, seed=seed): life(loss) for seed, loss in enumerate(theirs)}
    lives |= {replace(FIRST, way=SAME.name, seed=seed): life(0.5 + seed / 100) for seed in range(3)}
    told = figures(lives, ["pilot"])
    assert told[f"wins_over_{rival.method}"] == wins
    assert told["increment_vs_homogeneous"] == 1.0


def test_ways_whose_rates_fall_are_compared_with_each_other_alone() -> None:
    fall = {way: falling(way).name for way in (OURS, SAME, *RIVALS)}
    lives = {replace(FIRST, way=fall[OURS], seed=seed): life(0.2 + seed / 100) for seed in range(3)}
    lives |= {replace(FIRST, way=fall[SAME], seed=seed): life(0.1 + seed / 200) for seed in range(3)}
    lives |= {replace(FIRST, way=fall[RIVALS[0]], seed=seed): life(0.9 + seed / 100) for seed in range(3)}
    lives |= {replace(FIRST, seed=seed): life(2.0) for seed in range(3)}
    told = figures(lives, ["pilot"])
    assert told["falling_increment_vs_homogeneous"] == 2.0
    assert told[f"falling_wins_over_{RIVALS[0].method}"] == 1.0
    assert "increment_vs_homogeneous" not in told


@pytest.mark.parametrize("falls", ["constant", "linear"])
def test_a_rate_that_falls_is_whole_in_the_first_round_and_an_eighth_for_personal_models(falls: str) -> None:
    fleet = SimpleNamespace(devices={"a": (8, [1, 2, 3, 4, 5, 6])}, held_out=[], taking_part=1, shapes={})
    life_of = Life(fleet, replace(OURS, falls=falls), steps=1, seed=0, rate=Rate(0.01, 0.5))
    life_of.rounds = 4
    device = life_of.devices["a"]
    found = [life_of._rate(device, number) for number in (1, 2, 3, 4, 5)]
    whole = 0.01 * 2.0  # rank 8 of 32, to the power of a half
    shares = [1, 0.75, 0.5, 0.25, 0.125] if falls == "linear" else [1] * 5
    assert found == pytest.approx([whole * share for share in shares])


@pytest.mark.parametrize(("ways", "named"), [("at one rate", ["m.png"]), ("both", ["m-falling.png", "m.png"])])
def test_ways_whose_rates_fall_have_a_picture_of_their_own(tmp_path: Path, ways: str, named: list[str]) -> None:
    draw = pytest.importorskip("benchmarks.methods_plot").draw
    compared = (OURS, SAME, *RIVALS, *(map(falling, (OURS, SAME)) if ways == "both" else ()))
    draw(
        {replace(FIRST, way=way.name, seed=seed): life(0.1) for way in compared for seed in range(2)},
        tmp_path / "m.png",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == named
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_lives_that_are_kept_are_not_run_again(tmp_path: Path) -> None:
    kept = tmp_path / "lives.jsonl"
    kept.write_text(json.dumps({"key": FIRST.key, "life": life(0.5)}) + "\n", encoding="utf-8")
    runner = Runner(Place(tmp_path / "no such data", "minilm", "cpu"), kept, ThreadPoolExecutor(1), 4)
    assert runner.all([FIRST, FIRST], "lives") == {FIRST: life(0.5)}


def test_every_way_is_a_method_that_can_serve_its_fleet() -> None:
    for way in WAYS.values():
        method = aggregators.build(way.method)
        assert bool(way.rank) or not method.equal_ranks, f"{way.name} would be refused by an unequal fleet"
    assert {way.rank for way in WAYS.values() if way.method in EQUAL} <= {SMALLEST, 32}
    assert {way.method for way in WAYS.values()} == set(aggregators.METHODS)
    assert math.isinf(SETTINGS["iid"].alpha)


def test_rates_are_chosen_in_the_setting_that_a_setting_names_and_by_its_course() -> None:
    for name, setting in SETTINGS.items():
        chosen_in = SETTINGS[setting.tuned_on]
        assert chosen_in.tuned_on == setting.tuned_on
        assert (chosen_in.course, chosen_in.causal) == (setting.course, setting.causal), name
        for way in WAYS:
            rates = setting.course.rates(way)
            assert set(rates) & set(setting.course.quick), "a quick run tries no rate"
            assert not WAYS[way].rank or {rate.exponent for rate in rates} == {0.0}, "an exponent that is a factor"


def test_lives_of_one_fleet_go_side_by_side_and_no_more_than_may() -> None:
    orders = [replace(FIRST, seed=seed, rate=rate) for seed in range(2) for rate in (1e-3, 2e-3, 4e-3)]
    found = batches([*orders, replace(FIRST, rounds=9)], 2)
    assert sorted(map(len, found)) == [1, 1, 1, 2, 2]
    assert all(len({(order.setting, order.seed, order.rounds) for order in batch}) == 1 for batch in found)


def test_the_best_rates_and_half_of_the_best_go_on_to_all_rounds() -> None:
    losses = {1e-3: 0.6, 2e-3: 0.4, 4e-3: 0.5, 8e-3: math.inf}
    found = {replace(FIRST, rate=rate): life(loss) for rate, loss in losses.items()}
    assert finalists(found, OURS.name, 2) == [Rate(2e-3, 0.0), Rate(4e-3, 0.0), Rate(1e-3, 0.0)]
