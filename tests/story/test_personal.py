"""Each way to a personal adapter end to end: a tiny model, real training, two devices, a server, a real broker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import ways
from edge_runtime.wire.broker import EmbeddedBroker, Settings, start

pytest.importorskip("torch")

from tests.story.test_methods import RANKS, ROUNDS, Life, devices, live
from tests.wire.conftest import require

__all__ = ["devices"]  # a fixture

pytestmark = [pytest.mark.story, pytest.mark.broker, pytest.mark.torch, pytest.mark.timeout(300)]

METHODS: Mapping[str, str] = {"private_factor": "fedsa_lora", "two_level": "pf2lora"}
STEPS = ("training.personal_steps=3", "personal.every=1", "personal.proximal=0.05", "personal.rank=3")


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    require("nats")
    running = start("nats", store=tmp_path_factory.mktemp("broker"), settings=Settings(ack_wait_s=2.0))
    yield running
    running.stop()


def life(name: str, broker: EmbeddedBroker, devices: object, folder: Path, **own: ways.Own) -> Life:
    more = [f"fleet.name=personal-{name}".replace("_", "-"), *STEPS]
    more += [] if own else [f"personal.way={name}"]
    return live(METHODS.get(name, "increment"), broker, devices, folder, more, own)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(ways.WAYS))
def test_a_fleets_devices_leave_with_adapters_of_their_own(
    name: str, broker: EmbeddedBroker, devices: object, tmp_path: Path
) -> None:
    found = life(name, broker, devices, tmp_path)
    done = {record["client"]: record for record in found.records if record.get("state") == "done"}
    assert set(done) == set(RANKS)
    for device, record in done.items():
        losses = [record["held_out"][key] for key in ("base", "merged", "personal")]
        assert np.isfinite(losses).all()
        assert record["way"] == name
        assert record["delivered"] in {"personal", "global"}
        kept = found.kept[device]
        assert kept is not None
        assert (kept[0]["delivered"], kept[0]["losses"]["personal"]) == (record["delivered"], losses[2])
        personal = found.personal[device]
        mine = record["delivered"] == "personal"
        assert (kept[1] is not None) == (mine and name in ways.FREE), "a private part has a place of its own"
        if name == "beside":
            held = 8
            trained = {
                f"model.layers.{layer}.self_attn.{module}" for layer in range(3) for module in ("q_proj", "v_proj")
            }
            assert set(personal) == trained
            assert set(personal.ranks.values()) == {held + 3 * mine}
        between = [record for record in found.records if record.get("state") == "personalising"]
    rounds = {record["round"] for record in between}
    assert rounds == ({1, ROUNDS} if name in ways.FREE else {ROUNDS}), "a private part is trained in rounds already"


def test_devices_of_one_fleet_may_choose_for_themselves(
    broker: EmbeddedBroker, devices: object, tmp_path: Path
) -> None:
    found = life("chosen", broker, devices, tmp_path, small=ways.Own(way="beside", rank=2), large=ways.Own(every=0))
    done = {record["client"]: record["way"] for record in found.records if record.get("state") == "done"}
    assert done == {"small": "beside", "large": "finetune"}
