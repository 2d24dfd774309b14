"""What a device trains, round after round, over the whole protocol: each policy, restarts, and plans that change."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime import slicing
from edge_runtime.errors import ConfigError
from edge_runtime.lora.adapter import Adapter, LayerSlot, Pair, Slot
from edge_runtime.lora.slices import FRESH, LAST, POLICIES
from edge_runtime.state import DeviceState
from edge_runtime.trainer import Introduction
from edge_runtime.wire.codec import decode_slice
from edge_runtime.wire.messages import Offer, Report
from tests.runtime.desk import WELCOME, Desk, adapter, of
from tests.runtime.fleets import BRISK, GOAL, Devices, fleet_in
from tests.runtime.said import SPEC, directive
from tests.runtime.toy import SHAPES, ToyTrainer, distance
from tests.runtime.turns import Fleet

every_policy = pytest.mark.parametrize("name", sorted(POLICIES.keys() - {LAST}))


def spec_of(name: str, **changes: Any) -> dict[str, Any]:
    return {"adapter": SPEC.model_copy(update={"slice": name, **changes})}


# ── one device ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "directions"), [("top", (0, 1)), ("rotating", (2, 3)), ("fresh", (FRESH, FRESH + 1)), ("personal", None)]
)
def test_an_update_says_which_directions_it_is_a_change_of(
    desk: Desk, name: str, directions: tuple[int, ...] | None
) -> None:
    """Version 1, rank 2 of 4 held."""
    asked = desk.publish(adapter(1), round_number=2, **spec_of(name))
    [offer] = of(Offer, desk.tell(asked, WELCOME))
    kept = desk.disk.outbox
    assert kept is not None
    change, found = decode_slice(kept[1])
    for layer in SHAPES:
        assert found[layer] == directions or name == "personal"
        assert name == "fresh" or found[layer] == desk.trainer.slices[-1][layer], "what was trained is what is said"
        assert change[layer].rank == 2
        assert np.abs(change[layer].b).max() > 0
    assert offer.loss_last < offer.loss_first


def test_personal_looks_at_the_data_once_a_version_even_over_a_restart(desk: Desk) -> None:
    asked = desk.publish(adapter(1), round_number=2, **spec_of("personal"))
    desk.tell(asked, WELCOME)
    first = desk.trainer.slices[-1]
    assert desk.trainer.scored == 1
    desk.disk.settle(0, arrived=False)  # the update is lost, as when a device is killed before it is durable
    desk.restart()
    desk.tell(asked, WELCOME)
    assert (desk.trainer.scored, desk.trainer.slices[-1]) == (1, first)
    assert len(desk.trainer.rounds) == 2, "it has trained again"


def test_a_policy_that_this_device_does_not_know_ends_its_life_with_a_clear_word(desk: Desk) -> None:
    asked = desk.publish(adapter(1), round_number=2, **spec_of("best"))
    with pytest.raises(ConfigError, match=r"unknown slice 'best'; expected one of: .*; update this device"):
        desk.tell(asked, WELCOME)
    assert [report.state for report in of(Report, desk.heard())][-1] == "failed"


# ── the choice itself ─────────────────────────────────────────────────────────────────────────────────────────────


def wide() -> tuple[Introduction, Adapter]:
    """Two layers that hold eight and train four; all energy is in one of them."""
    slot = Slot({name: LayerSlot(*SHAPES[name], held=8, trained=4) for name in SHAPES})
    found = adapter(3)
    strong, weak = SHAPES
    return (
        Introduction(slot, "b" * 64, 10, "d", "fp32", "p", "s"),
        Adapter({strong: found[strong], weak: Pair(found[weak].a, 1e-3 * found[weak].b)}),
    )


def test_ranks_follow_the_spectrum_within_the_plan_and_are_remembered(tmp_path: Path) -> None:
    plan, received = wide()
    disk = DeviceState(tmp_path)
    asked = directive(round_number=2, **spec_of("top", allocation="spectrum"))
    found = slicing.choose(asked, plan, received, disk, dict)
    strong, weak = SHAPES

    assert not found.plain
    assert (len(found.slices.rows[strong]), len(found.slices.rows[weak])) == (6, 1)
    numbers = sum(len(rows) * sum(SHAPES[name]) for name, rows in found.slices.rows.items())
    assert numbers <= sum(4 * sum(shape) for shape in SHAPES.values())
    assert disk.fact(slicing.RANKS) == {strong: 6, weak: 1}
    again = slicing.choose(asked, plan, received, disk, dict)
    assert again.slices.rows == found.slices.rows, "as after a restart in the middle of the round"
    disk.close()


def test_before_there_is_a_spectrum_every_layer_has_the_rank_of_the_plan(tmp_path: Path) -> None:
    plan, received = wide()
    disk = DeviceState(tmp_path)
    empty = Adapter({name: Pair(pair.a, 0 * pair.b) for name, pair in received.items()})
    found = slicing.choose(directive(**spec_of("top", allocation="spectrum")), plan, empty, disk, dict)

    assert found.plain
    assert {len(rows) for rows in found.slices.rows.values()} == {4}
    with pytest.raises(ConfigError, match="unknown allocation 'best'; expected one of: spectrum, uniform"):
        slicing.choose(directive(**spec_of("top", allocation="best")), plan, empty, disk, dict)
    disk.close()


# ── fleets ────────────────────────────────────────────────────────────────────────────────────────────────────────


def unequal(*ranks: int) -> Devices:
    return {f"rank-{rank}": partial(ToyTrainer, GOAL, rank=rank) for rank in ranks}


def settings(name: str, allocation: str = "uniform") -> tuple[str, ...]:
    return (f"adapter.slice={name}", f"adapter.allocation={allocation}")


@pytest.mark.parametrize("allocation", ["uniform", "spectrum"])
@every_policy
def test_unequal_devices_reach_the_optimum_by_every_policy(folder: Path, name: str, allocation: str) -> None:
    fleet = fleet_in(
        folder,
        "learns",
        *settings(name, allocation),
        "rounds.num_rounds=20",
        "rounds.min_available_nodes=3",
        "training.learning_rate=0.4",
        "training.max_steps=6",
        devices=unequal(2, 4, 8),
    ).run()

    assert distance(fleet.merged(), GOAL) < (0.12 if name == "fresh" else 0.03)
    [smallest] = fleet.trainers["rank-2"]
    assert len({tuple(sorted(found.items())) for found in smallest.slices}) > 1 or name == "top"


def calm(folder: Path, name: str, allocation: str, devices: Devices, **kwargs: Any) -> Fleet:
    return fleet_in(
        folder, "life", *BRISK, "rounds.num_rounds=3", *settings(name, allocation), devices=devices, **kwargs
    )


@pytest.mark.parametrize("allocation", ["uniform", "spectrum"])
@every_policy
def test_a_device_that_is_killed_in_the_middle_of_a_round_trains_the_same_slice_again(
    folder: Path, name: str, allocation: str
) -> None:
    devices = unequal(2, 4)
    whole = calm(folder / "calm", name, allocation, devices).run()
    before = [at for at, operation in enumerate(whole.operations["rank-2"], 1) if operation == "put_outbox"]
    killed = calm(folder / "killed", name, allocation, devices, fuses={"rank-2": [before[1]]}).run()

    assert len(killed.kills) == 1
    assert len(killed.trainers["rank-2"]) == 2
    assert killed.merged().digest() == whole.merged().digest()


@every_policy
def test_a_device_that_must_plan_anew_in_the_middle_of_a_round_goes_on_with_what_it_can_bear(
    folder: Path, name: str
) -> None:
    devices: Devices = {
        "small": partial(ToyTrainer, GOAL, rank=4, bears=2),
        "large": partial(ToyTrainer, GOAL, rank=4),
    }
    overrides = ("training.max_steps=3", "rounds.num_rounds=3", *settings(name, "spectrum"))
    fleet = fleet_in(folder, "steps down", *overrides, devices=devices).run()
    [small] = fleet.trainers["small"]

    assert {count for _, count in fleet.merges()} == {2}, "nobody's update was refused"
    assert max(len(rows) for rows in small.slices[0].values()) == 4
    assert sum(len(rows) for rows in small.slices[-1].values()) <= 2 * len(SHAPES)
