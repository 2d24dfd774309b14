"""Whole fleets over the broker in memory: they reach the optimum, and devices may come and go."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.client import Client, Identity, will
from edge_runtime.errors import FingerprintMismatchError, PlanError
from edge_runtime.lora.adapter import Adapter
from edge_runtime.state import DeviceState
from edge_runtime.trainer import Delivered
from edge_runtime.wire import topics
from edge_runtime.wire.memory import MemoryBroker
from edge_runtime.wire.messages import Offer, load
from server import aggregators
from server.aggregators.beside import published
from server.aggregators.method import load_state
from server.service import Service
from server.store import Store
from tests.runtime.fleets import BRISK, GOAL, PAIR, Devices, calm, check_undisturbed, fleet_in
from tests.runtime.toy import SHAPES, ToyTrainer, distance, optimum, targets
from tests.runtime.turns import Fleet, fleet_config
from tests.server.merging import UNEQUAL

# ── learning ──────────────────────────────────────────────────────────────────────────────────────────────────────


def learn(folder: Path, method: str, devices: Devices, rounds: int = 14) -> Fleet:
    """A fleet that learns; with HetLoRA devices keep their ranks, or toys of rank 8 would have lost all but one."""
    return fleet_in(
        folder,
        method,
        *(["aggregator.gamma=1.0"] if method == "hetlora" else []),
        f"aggregator.method={method}",
        f"rounds.num_rounds={rounds}",
        f"rounds.min_available_nodes={len(devices)}",
        "training.learning_rate=0.4",
        "training.max_steps=6",
        devices=devices,
    ).run()


def alike(*ranks: int) -> Devices:
    """Devices that all want the same."""
    return {f"rank-{rank}-{at}": partial(ToyTrainer, GOAL, rank=rank) for at, rank in enumerate(ranks)}


def reachable(method: str, merged: Adapter) -> float:
    """How near to the goal a method can come: all the way, but where `a` stays as it was drawn."""
    if {aggregators.build(method).asks(number).trained for number in (1, 2)} != {"b"}:
        return 0.0
    apart = {name: goal - goal @ np.linalg.pinv(merged[name].a) @ merged[name].a for name, goal in GOAL.items()}
    return float(np.sqrt(sum(np.sum(part**2) for part in apart.values()) / sum(np.sum(g**2) for g in GOAL.values())))


@pytest.mark.parametrize("method", sorted(aggregators.METHODS))
def test_a_fleet_of_equal_devices_reaches_the_optimum_by_every_method(folder: Path, method: str) -> None:
    """Or, where every device has a model of its own, each of them does."""
    built = aggregators.build(method)
    rounds = 28 if built.asks(1) != built.asks(2) else 14  # half a step in each
    fleet = learn(folder, method, alike(8, 8, 8), rounds)
    merged, private = published(fleet.stored()), built.private
    # Where devices have something of their own, each of them has a model, and the server has a part of it or none.
    models = [found[0].live for found in fleet.trainers.values()] if private or built.own else [merged]
    assert all(distance(model, GOAL) < reachable(method, merged) + 0.03 for model in models)
    assert not private or distance(merged, GOAL) > 0.9, "the server has no model"
    assert fleet.merges() == [(number, 3) for number in range(1, rounds + 1) for _ in SHAPES]


def test_a_fleet_of_unequal_devices_reaches_the_optimum_by_increments_only(folder: Path) -> None:
    """The published methods stop where averaging takes away as much as training adds."""
    far = {method: distance(published(learn(folder, method, alike(2, 4, 8)).stored()), GOAL) for method in UNEQUAL}
    assert far["increment"] < 0.03
    assert far["svd"] > 3 * far["increment"]
    assert far["zero_pad"] > 3 * far["increment"]


def test_devices_that_want_different_things_meet_at_their_mean_weighted_by_examples(folder: Path) -> None:
    own = [{name: 2 * GOAL[name] if at else 0 * GOAL[name] for name in SHAPES} for at in range(2)]
    devices: Devices = {
        "few": partial(ToyTrainer, own[0], rank=8, examples=10),
        "many": partial(ToyTrainer, own[1], rank=8, examples=30),
    }
    fleet = learn(folder, "increment", devices)
    wanted = optimum(found[0] for found in fleet.trainers.values())
    assert distance(fleet.merged(), wanted) < 0.1
    assert distance(fleet.merged(), GOAL) > 0.3, "the unweighted mean"


def test_every_device_ends_with_a_personal_adapter_that_is_better_for_it(folder: Path) -> None:
    own = {name: targets(seed) for seed, name in enumerate("ab", start=5)}
    devices: Devices = {name: partial(ToyTrainer, goal, rank=4) for name, goal in own.items()}
    fleet = fleet_in(folder, "own", "training.personal_steps=20", devices=devices).run()
    done = {record["client"]: record for record in fleet.records if record.get("state") == "done"}
    for name, goal in own.items():
        losses = done[name]["held_out"]
        assert losses["personal"] < losses["merged"] < losses["base"]
        [trainer] = fleet.trainers[name]
        assert distance(trainer.live, goal) < distance(fleet.merged(), goal)
    assert fleet.delivered == {"a": 1, "b": 1}


def test_the_same_fleet_does_the_same(folder: Path) -> None:
    lives = [fleet_in(folder, name, *BRISK).run() for name in ("first", "second")]
    assert lives[0].merged().digest() == lives[1].merged().digest()
    assert lives[0].operations == lives[1].operations


def test_a_round_of_a_few_asks_different_devices_in_turn(folder: Path) -> None:
    fleet = fleet_in(
        folder, "few", "rounds.fraction_train=0.5", "rounds.num_rounds=6", "rounds.min_available_nodes=4", *BRISK,
        devices=alike(2, 2, 4, 4),
    ).run()  # fmt: skip
    assert {updates for _, updates in fleet.merges()} == {2}
    took_part = {name: len(found[0].rounds) for name, found in fleet.trainers.items()}
    assert sum(took_part.values()) == 12
    assert min(took_part.values()) >= 1


# ── coming and going ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_device_that_joins_late_takes_part_from_then_on(folder: Path) -> None:
    devices: Devices = {**PAIR, "c": partial(ToyTrainer, GOAL, rank=8)}
    fleet = fleet_in(folder, "late", *BRISK, "rounds.num_rounds=3", devices=devices, absent=("c",))
    fleet.run(until=lambda: fleet.state is not None and fleet.state.round == 2)
    fleet.join("c")
    fleet.run()
    assert sorted(set(fleet.merges())) == [(1, 2), (2, 3), (3, 3)]
    assert fleet.trainers["c"][0].rounds[0] == 2
    assert fleet.delivered["c"] == 1


def test_a_device_that_leaves_is_given_up_and_comes_back_with_what_it_had(folder: Path) -> None:
    """It left with an update of round 1 in its outbox; the fleet went on without it."""
    devices: Devices = {**PAIR, "c": partial(ToyTrainer, GOAL, rank=8)}
    overrides = ("rounds.num_rounds=3", "rounds.progress_timeout=30", "rounds.min_available_nodes=3")
    fleet = fleet_in(folder, "leaves", *BRISK, *overrides, devices=devices)
    fleet.run(until=lambda: "put_outbox" in fleet.operations["c"])
    fleet.leave("c")
    fleet.run(until=lambda: fleet.state is not None and fleet.state.round == 2)
    fleet.join("c")
    fleet.run()
    assert sorted(set(fleet.merges())) == [(1, 2), (2, 3), (3, 3)]
    assert [life.rounds[0] for life in fleet.trainers["c"]] == [1, 2]
    assert fleet.delivered["c"] == 1


def test_once_the_last_version_is_announced_devices_need_the_server_no_more(folder: Path) -> None:
    """It goes away while everybody still has to finish; a device that was never here before finishes as well."""
    devices: Devices = {**PAIR, "c": partial(ToyTrainer, GOAL, rank=8)}
    fleet = fleet_in(folder, "alone", *BRISK, devices=devices, absent=("c",))
    fleet.run(until=lambda: fleet.state is not None and fleet.state.phase == "finish")
    fleet.leave("server")
    fleet.join("c")
    fleet.run(sweeps=200)
    assert fleet.delivered == {"a": 1, "b": 1, "c": 1}
    newest = fleet.trainers["c"][0]._received
    assert newest.ranks == {name: min(16, *shape) for name, shape in SHAPES.items()}


def test_a_device_that_comes_after_all_is_over_still_gets_its_personal_adapter(folder: Path) -> None:
    devices: Devices = {**PAIR, "c": partial(ToyTrainer, GOAL, rank=8)}
    fleet = fleet_in(folder, "over", *BRISK, devices=devices, absent=("c",)).run()
    assert fleet.state is not None
    assert fleet.state.phase == "over"
    fleet.join("c")
    fleet.run(sweeps=200)
    assert fleet.delivered["c"] == 1


def test_a_device_of_another_base_is_turned_away_and_the_others_go_on(folder: Path) -> None:
    devices: Devices = {**PAIR, "odd": partial(ToyTrainer, GOAL, rank=2, base="c" * 64)}
    fleet = fleet_in(folder, "odd", *BRISK, devices=devices, absent=("odd",))
    fleet.run(until=lambda: fleet.state is not None and len(fleet.state.members) == 2)
    fleet.join("odd")
    with pytest.raises(FingerprintMismatchError, match="this fleet trains the base bbbb"):
        fleet.run()
    fleet.run()
    check_undisturbed(fleet)


class Poor(ToyTrainer):
    """A device whose memory does not suffice when it comes to training."""

    def train(self, *_args: Any, **_kwargs: Any) -> Any:
        """Fail as the real trainer would."""
        raise PlanError("12 MiB are missing")


def test_a_device_that_fails_is_not_waited_for(folder: Path) -> None:
    devices: Devices = {**PAIR, "poor": partial(Poor, GOAL, rank=2)}
    fleet = fleet_in(folder, "poor", *BRISK, "rounds.min_available_nodes=3", devices=devices)
    with pytest.raises(PlanError):
        fleet.run()
    fleet.run(sweeps=300)
    assert {updates for _, updates in fleet.merges()} == {2}
    assert fleet.state is not None
    assert fleet.state.ended["poor"].detail == "12 MiB are missing"


def test_a_fleet_begun_anew_makes_devices_forget_the_former_life(folder: Path) -> None:
    """The server's disk is lost in the middle; devices, and the broker's retained messages, are as they were."""
    fleet = fleet_in(folder, "anew", *BRISK)
    fleet.run(until=lambda: fleet.state is not None and fleet.state.round == 2)
    fleet.run(until=lambda: any(found[0].rounds == [1, 2] for found in fleet.trainers.values()))
    former = fleet.state.run if fleet.state else ""
    fleet.leave("server")
    shutil.rmtree(fleet.folder / "server")
    fleet.records.clear()
    fleet.join("server")
    fleet.run()
    assert fleet.state is not None
    assert fleet.state.run != former
    check_undisturbed(fleet)
    for found in fleet.trainers.values():
        assert found[0].rounds[-2:] == [1, 2]


def test_nobody_else_may_speak_for_a_device(folder: Path) -> None:
    """A stranger repeats what it overheard, and sends chunks of its own: the result is that of a calm life."""
    fleet = fleet_in(folder, "stranger", *BRISK)
    stranger = fleet.broker.connect("stranger")
    stranger.subscribe(topics.everything("fleet"))
    while not fleet.ended:
        fleet.sweep()
        delivery = stranger.receive(0.0)
        if delivery is None:
            continue
        delivery.ack()
        topic = topics.parse("fleet", delivery.topic)
        if topic is not None and topic.kind == "up" and topic.client == "a":
            message = load(delivery.payload)
            if isinstance(message, Offer):
                stranger.publish(topics.upload("fleet", "a", message.blob.sha256, 0), b"too short to be true")
                stranger.publish(topics.up("fleet", "b"), delivery.payload)
            stranger.publish(topics.down("fleet", "a"), delivery.payload)
    check_undisturbed(fleet)
    assert any(note.startswith("dropped a message") for note in fleet.notes)


# ── with real threads and a real clock ────────────────────────────────────────────────────────────────────────────


def test_a_fleet_of_threads_finishes_with_the_same_bytes(tmp_path: Path) -> None:
    """Order of arrival is left to the scheduler; updates are sorted, so it leaves no trace."""
    broker, settings_, errors = MemoryBroker(), fleet_config(*BRISK), []
    stopped = threading.Event()

    def serve() -> None:
        store = Store(tmp_path / "server")
        server = Service(settings_, broker.connect("server"), store, say=lambda _: None, record=lambda _: None)
        server.run(stopped.is_set, poll=0.01)
        store.close()

    def take_part(name: str) -> None:
        disk = DeviceState(tmp_path / name)
        Client(
            Identity("fleet", name, chunk_bytes=1024),
            transport=broker.connect(name, will=will("fleet", name)),
            state=disk,
            trainer=PAIR[name](),
            deliver=lambda: Delivered(name, 0.0),
            say=lambda _: None,
        ).run(stopped.is_set, poll=0.01)
        disk.close()

    def guard(work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001  raised again below, in the test's own thread
            errors.append(error)

    works: list[Callable[[], None]] = [serve, *(partial(take_part, name) for name in PAIR)]
    threads = [threading.Thread(target=guard, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    stopped.set()
    assert not errors
    assert not any(thread.is_alive() for thread in threads)
    store = Store(tmp_path / "server")
    last = store.version(2)
    store.close()
    assert last is not None
    assert load_state(last.state).adapter.digest() == calm()[0]
