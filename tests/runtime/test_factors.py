"""Rounds of one factor, over the wire: what travels, what stays at home, and what a kill leaves of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.lora.algebra import cut, take
from edge_runtime.state import DeviceState
from edge_runtime.wire import topics
from edge_runtime.wire.messages import Directive, load
from server import aggregators
from tests.runtime.fleets import Devices, fleet_in
from tests.runtime.toy import SHAPES, ToyTrainer, targets
from tests.runtime.turns import Fleet

OWN = {name: targets(seed) for seed, name in enumerate("ab", start=5)}
DEVICES: Devices = {name: partial(ToyTrainer, goal, rank=8) for name, goal in OWN.items()}
APART = sorted(name for name in aggregators.METHODS if aggregators.build(name).apart)
RANGES = 2
"""Bands of a global adapter of rank 8."""
FAST = ("training.personal_steps=0", "training.max_steps=2", "wire.codec_up=fp32", "wire.codec_down=fp32")


def life(folder: Path, method: str, *overrides: str, kills: dict[str, list[int]] | None = None) -> Fleet:
    settings = (f"aggregator.method={method}", "rounds.num_rounds=4", *FAST, *overrides)
    return fleet_in(folder, method, *settings, devices=DEVICES, fuses=kills).run()


def sent(fleet: Fleet) -> int:
    """Bytes of all updates."""
    return sum(record["bytes"] for record in fleet.records if record["event"] == "update")


def models(fleet: Fleet) -> list[str]:
    return [found[-1].live.digest() for _, found in sorted(fleet.trainers.items())]


@pytest.mark.parametrize("method", APART)
def test_of_one_factor_half_the_numbers_travel(folder: Path, method: str) -> None:
    whole, half = (sent(life(folder, name)) for name in ("fedit", method))
    assert half < 0.62 * whole


@pytest.mark.parametrize("method", APART)
@pytest.mark.parametrize("downlink", ["fp32", "int8"])
def test_a_factor_that_nobody_changed_is_not_fetched_again(folder: Path, method: str, downlink: str) -> None:
    """Each band comes once for the first version, and once for each round that changed its factor."""
    fleet, built = life(folder, method, f"wire.codec_down={downlink}"), aggregators.build(method)
    changed = [built.asks(number).sent for number in range(1, 5)]
    versions = {factor: 1 + changed.count(factor) for factor in ("a", "b") if factor != built.private}
    # The first `b` is zero in both ranges, which makes them one blob.
    assert fleet.operations["a"].count("put_band") == RANGES * sum(versions.values()) - ("b" in versions)


@pytest.mark.parametrize("method", APART)
@pytest.mark.parametrize("at", [9, 16, 23, 31])
def test_a_device_that_was_killed_ends_where_it_would_have_ended(folder: Path, method: str, at: int) -> None:
    calm = life(folder / "calm", method)
    disturbed = life(folder / "killed", method, kills={"a": [at]})
    assert disturbed.kills
    assert disturbed.merged().digest() == calm.merged().digest()
    assert models(disturbed) == models(calm)


def test_a_private_factor_is_the_devices_own_and_outlives_rounds(folder: Path) -> None:
    fleet = life(folder, "fedsa_lora")
    mine = {name: found[-1].live for name, found in fleet.trainers.items()}
    for layer in SHAPES:
        assert np.array_equal(mine["a"][layer].a, mine["b"][layer].a), "`a` is shared"
        assert mine["a"][layer].b.any()
        assert not np.array_equal(mine["a"][layer].b, mine["b"][layer].b)
    assert not any(pair.b.any() for pair in fleet.merged().values())


def test_bands_of_a_private_factor_are_not_fetched(folder: Path) -> None:
    fleet = life(folder, "fedsa_lora")
    found = load(fleet.broker.retained[topics.directive("fleet")])
    assert isinstance(found, Directive)
    assert {band.factor for band in found.bands} == {"a", "b"}
    assert found.private == "b"


def test_another_life_of_the_fleet_begins_without_what_was_private(folder: Path) -> None:
    fleet = life(folder, "fedsa_lora")
    disk = DeviceState(fleet.folder / "a")
    found = [disk.kept]
    disk.adopt("another")
    found.append(disk.kept)
    disk.close()
    assert found[0]
    assert found[1] is None


@pytest.mark.parametrize("codec", ["auto", "int2", "topk"])
def test_any_codec_serves_one_factor(folder: Path, codec: str) -> None:
    fleet = life(folder, "rolora", f"wire.codec_up={codec}", "wire.upload_bytes=2000")
    assert fleet.merges()[-1] == (4, 2)
    assert any(pair.b.any() for pair in fleet.merged().values())


PRUNING = ("aggregator.gamma=0.7", "aggregator.penalty=15.0", "rounds.num_rounds=6", "training.learning_rate=0.05")


def test_devices_prune_their_ranks_and_go_on_with_what_is_left(folder: Path) -> None:
    fleet = life(folder, "hetlora", *PRUNING)
    ranks = [tuple(len(rows) for rows in found.values()) for found in fleet.trainers["a"][0].slices]
    # A device looks at all that its plan holds before each round, and at the end.
    assert ranks == [(8, 8), (8, 8), (8, 8), (5, 5), (8, 8), (3, 3), (8, 8), (2, 2), (8, 8), (1, 1), (8, 8)]
    assert fleet.merges()[-1] == (6, 2)


@pytest.mark.parametrize("at", [30, 45])
def test_a_device_that_prunes_and_is_killed_ends_where_it_would_have_ended(folder: Path, at: int) -> None:
    calm = life(folder / "calm", "hetlora", *PRUNING)
    disturbed = life(folder / "killed", "hetlora", *PRUNING, kills={"a": [at]})
    assert disturbed.kills
    assert disturbed.merged().digest() == calm.merged().digest()


def test_directions_of_a_devices_own_are_learnt_kept_and_never_sent(folder: Path) -> None:
    """What devices share is FedIT's in size; what they have learnt for themselves differs."""
    overrides = ("adapter.max_rank=2", "aggregator.own=3", "training.personal_steps=0", "training.max_steps=4")
    fleet = life(folder, "pf2lora", *overrides)
    found = {name: trainers[-1].live for name, trainers in fleet.trainers.items()}
    merged = fleet.merged()
    for layer in SHAPES:
        assert merged[layer].rank == 2
        assert found["a"][layer].rank == 5
        assert np.array_equal(cut(found["a"][layer], 2).b, cut(found["b"][layer], 2).b), "the first level is shared"
        mine, theirs = (take(found[name][layer], range(2, 5)).product() for name in "ab")
        assert np.linalg.norm(mine) > 1e-3
        assert np.linalg.norm(mine - theirs) > 1e-3
    plain = life(folder, "fedit", *(text for text in overrides if "own" not in text))
    assert sent(fleet) <= sent(plain) * 1.02
    losses = {
        name: [r["held_out"]["personal"] for r in f.records if r.get("state") == "done"]
        for name, f in (("own", fleet), ("plain", plain))
    }
    assert sum(losses["own"]) < sum(losses["plain"]), "of devices that want different things"


@pytest.mark.parametrize("at", [16, 31])
def test_own_directions_of_a_device_that_was_killed_are_what_they_would_have_been(folder: Path, at: int) -> None:
    calm = life(folder / "calm", "pf2lora")
    disturbed = life(folder / "killed", "pf2lora", kills={"a": [at]})
    assert disturbed.kills
    assert disturbed.merged().digest() == calm.merged().digest()
    assert models(disturbed) == models(calm)
