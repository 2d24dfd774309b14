"""The real trainer on a tiny base: what it takes, gives back and leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import DataError, PlanError
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import changed, take
from edge_runtime.trainer import AdapterSpec, LocalResult, StepReport, Training
from tests.product import QUIET
from tests.story.fleet import TARGETS, write_examples
from tests.train.tiny import random_adapter

pytest.importorskip("torch")

from edge_runtime.train.bounds import PRIMITIVES, VARIABLES, bound_primitive_cache
from edge_runtime.train.families import get
from edge_runtime.train.local import LocalSettings, LocalTrainer
from edge_runtime.train.planning import Owner
from profiles.terms import Overrides
from tests.train.devices import settings_in

pytestmark = pytest.mark.torch

SPEC = AdapterSpec(
    family="lora", target_modules=TARGETS, scaling=2.0, max_rank=8, max_held=16, hold_more=True, max_length=32
)
GO = lambda: False  # noqa: E731 - a gate that is always open
TRAINING = Training(
    max_steps=3, learning_rate=5e-3, batch_size=2, warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, seed=7
)


SMALL = Overrides(rank=2, held=2, layers_trained=2, precision="nf4", micro_batch=1, threads=1)
ROOMY = Overrides(rank=8, held=16, precision="nf4", micro_batch=2, threads=1)
"""What a plan would choose depends on the machine; what a trainer makes of it does not."""


@pytest.fixture(scope="module")
def settings(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalSettings:
    """A device that trains the last two of three layers at rank 2, and holds rank 2."""
    return settings_in(tmp_path_factory.mktemp("device"), tiny_base, SMALL)


def introduced(settings: LocalSettings, spec: AdapterSpec = SPEC, ceiling: int | None = None) -> LocalTrainer:
    """A trainer that has planned."""
    trainer = LocalTrainer(settings, say=lambda _: None)
    trainer.introduce(spec, TRAINING, ceiling, lambda _: None)
    return trainer


@pytest.fixture(scope="module")
def small(settings: LocalSettings) -> LocalTrainer:
    """The small device; a test that trains it begins with `receive`."""
    return introduced(settings)


@pytest.fixture(scope="module")
def roomy(settings: LocalSettings) -> LocalTrainer:
    """A device that trains rank 8 of 16 that it holds, in all layers."""
    return introduced(replace(settings, owner=Owner(overrides=ROOMY)))


def received_by(trainer: LocalTrainer, seed: int = 0) -> Adapter:
    """A global adapter, cut to what the trainer holds; the trainer has received it."""
    adapter = random_adapter(trainer.ready.slot, seed, size=0.05)
    trainer.receive(adapter)
    return adapter


def trained(trainer: LocalTrainer, round_number: int = 1) -> LocalResult:
    """One round."""
    return trainer.train(TRAINING, round_number, lambda _: None, GO)


def assert_close(one: Pair, other: Pair) -> None:
    """Equal up to the rounding of a difference and a sum."""
    np.testing.assert_allclose(one.a, other.a, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(one.b, other.b, rtol=1e-6, atol=1e-7)


def test_a_plan_becomes_a_slot_with_layers_that_are_only_held(small: LocalTrainer, roomy: LocalTrainer) -> None:
    for trainer, held, layers, rank in ((small, 2, 2, 2), (roomy, 16, 3, 8)):
        slot = trainer.ready.slot
        assert set(slot.held.values()) == {held}
        assert set(slot.trained.values()) == {rank}
        assert len({name.split(".")[2] for name in slot.trained}) == layers


def test_an_introduction_tells_the_server_what_it_must_know(small: LocalTrainer, settings: LocalSettings) -> None:
    intro = small.introduce(SPEC, TRAINING, None, lambda _: None)

    assert intro.slot == small.ready.slot
    assert intro.base == small.ready.base.prepared.fingerprint
    assert intro.examples == round(0.75 * len(settings.examples))
    assert intro.precision == "nf4"
    assert "last 2 of 3 layers" in intro.plan
    assert all(
        f"{library} " in intro.software for library in ("python", "torch", "transformers", "peft", "bitsandbytes")
    )


def test_the_same_kind_of_adapter_is_planned_and_loaded_once(small: LocalTrainer) -> None:
    before = small.ready
    small.introduce(SPEC, TRAINING, None, lambda _: None)

    assert small.ready is before


def test_the_change_applied_to_what_was_received_is_what_the_live_model_holds(roomy: LocalTrainer) -> None:
    received = received_by(roomy)
    result = trained(roomy)
    live = get("lora").read_trained(roomy.ready.live)

    assert set(result.change) == set(roomy.ready.slot.trained)
    for name, moved in result.change.items():
        assert_close(changed(take(received[name], roomy.ready.live.directions[name]), moved), live[name])
        assert np.abs(moved.product()).max() > 0


def test_a_layer_that_is_not_trained_has_no_change_and_stays_as_it_was_received(small: LocalTrainer) -> None:
    received = received_by(small)
    result = trained(small)
    frozen = [name for name in received if ".layers.0." in name]

    assert len(frozen) == len(TARGETS)
    assert not set(frozen) & set(result.change)
    for name in frozen:
        assert_close(small.personal()[name], received[name])


def test_a_personal_adapter_is_all_that_is_held_with_the_trained_directions_moved(roomy: LocalTrainer) -> None:
    received = received_by(roomy)
    result = trained(roomy)
    personal = roomy.personal()

    assert personal.ranks == received.ranks
    for name, moved in result.change.items():
        rows = roomy.ready.live.directions[name]
        others = [row for row in range(received[name].rank) if row not in rows]
        assert_close(take(personal[name], others), take(received[name], others))
        assert_close(take(personal[name], rows), changed(take(received[name], rows), moved))


def test_the_same_seed_and_round_give_the_same_change_bit_for_bit(small: LocalTrainer, settings: LocalSettings) -> None:
    """In one process again and again, and in a device that starts anew."""
    received_by(small)
    first = trained(small, 2)
    received_by(small)
    again = trained(small, 2)
    fresh = introduced(settings)
    received_by(fresh)

    assert again.change.digest() == first.change.digest()
    assert trained(fresh, 2).change.digest() == first.change.digest()
    assert (again.examples, again.loss_first, again.loss_last) == (first.examples, first.loss_first, first.loss_last)


def test_another_round_or_another_seed_takes_the_examples_in_another_order(small: LocalTrainer) -> None:
    digests = set()
    for training, number in ((TRAINING, 1), (TRAINING, 2), (TRAINING.model_copy(update={"seed": 8}), 1)):
        received_by(small)
        digests.add(small.train(training, number, lambda _: None, GO).change.digest())

    assert len(digests) == 3


def test_a_micro_batch_of_another_size_takes_the_same_examples(small: LocalTrainer, roomy: LocalTrainer) -> None:
    """What a device can bear must not decide what it learns from."""
    assert small.ready.plan.micro_batch < roomy.ready.plan.micro_batch
    for trainer in (small, roomy):
        received_by(trainer)

    assert trained(small).examples == trained(roomy).examples == 6


def test_every_step_is_reported(small: LocalTrainer) -> None:
    received_by(small)
    steps: list[StepReport] = []
    result = small.train(TRAINING, 1, steps.append, GO)

    assert [(at.step, at.steps) for at in steps] == [(1, 3), (2, 3), (3, 3)]
    assert (steps[0].loss, steps[-1].loss) == (result.loss_first, result.loss_last)


def test_training_lowers_the_loss_on_what_was_not_trained_on(roomy: LocalTrainer) -> None:
    received_by(roomy)
    before = roomy.evaluate()
    roomy.train(TRAINING.model_copy(update={"max_steps": 30}), 1, lambda _: None, GO)

    assert roomy.evaluate() < before


def test_an_evaluation_changes_nothing(roomy: LocalTrainer) -> None:
    received_by(roomy)
    before, personal = roomy.evaluate(), roomy.personal().digest()

    assert roomy.evaluate() == before
    assert roomy.personal().digest() == personal


def test_a_stop_in_the_middle_leaves_nothing_half_done(settings: LocalSettings) -> None:
    steps: list[StepReport] = []
    trainer = introduced(settings)
    received = received_by(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(TRAINING, 1, steps.append, lambda: len(steps) == 2)
    assert len(steps) == 2

    # The interrupted trainer goes on as one that never began.
    steps.clear()
    one_step = TRAINING.model_copy(update={"max_steps": 1})
    alone = introduced(settings)
    changes = []
    for device in (trainer, alone):
        device.receive(received)
        changes.append(device.train(one_step, 1, lambda _: None, GO).change.digest())
    assert changes[0] == changes[1]


def test_a_stop_before_the_first_step_ends_the_round_as_well(settings: LocalSettings) -> None:
    trainer = introduced(settings)
    received_by(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(TRAINING, 1, lambda _: None, lambda: True)


def test_work_before_its_time_is_refused(settings: LocalSettings) -> None:
    trainer = LocalTrainer(settings, say=lambda _: None)
    with pytest.raises(DataError, match=r"introduce\(\) comes first"):
        trainer.evaluate()
    trainer.introduce(SPEC, TRAINING, None, lambda _: None)
    with pytest.raises(DataError, match=r"receive\(\) comes first"):
        trained(trainer)


def test_a_released_trainer_holds_no_model(settings: LocalSettings) -> None:
    trainer = introduced(settings)
    trainer.release()

    with pytest.raises(DataError):
        trainer.personal()


def test_a_device_without_room_says_how_much_is_missing(settings: LocalSettings) -> None:
    with pytest.raises(PlanError, match="MiB are missing"):
        introduced(replace(settings, owner=Owner(memory_limit=64 << 20)))


def test_a_fleet_that_may_hold_no_more_than_it_trains_gets_slots_that_do_not(settings: LocalSettings) -> None:
    eight = Owner(overrides=Overrides(rank=8, precision="nf4", threads=1))
    lean = introduced(replace(settings, owner=eight), SPEC.model_copy(update={"hold_more": False}))

    assert {(layer.held, layer.trained) for layer in lean.ready.slot.layers.values()} == {(8, 8)}


# ── the bound on oneDNN's cache ───────────────────────────────────────────────────────────────────────────────────


def test_the_bound_is_set_where_nobody_has_set_another() -> None:
    environ: dict[str, str] = {}
    bound_primitive_cache(environ)

    assert environ == dict.fromkeys(VARIABLES, str(PRIMITIVES))


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_bound_that_a_person_has_set_is_left_alone(variable: str) -> None:
    environ = {variable: "7", "PATH": "/bin"}
    bound_primitive_cache(environ)

    assert environ == {**dict.fromkeys(VARIABLES, str(PRIMITIVES)), variable: "7", "PATH": "/bin"}


FIRST_PRODUCT = """
import ctypes, json, sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode

getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn_linear"}
found = []

class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS and not found:
            # What the library below reads, not Python's copy of it.
            found.append({name: (getenv(name.encode()) or b"").decode() for name in json.loads(sys.argv[1])})
        return func(*args, **(kwargs or {}))

from edge_runtime import config
from edge_runtime.cli import client
from edge_runtime.trainer import AdapterSpec, Training

with Watch():
    settings = client._configure(json.loads(sys.argv[2]), None, None, None, ["device.threads=1"])
    trainer = client._trainer(settings, client.owner_of(settings.device), lambda text: None)
    before = list(found)
    spec, training = AdapterSpec.model_validate_json(sys.argv[3]), Training.model_validate_json(sys.argv[4])
    trainer.introduce(spec, training, None, lambda peak: None)
print(json.dumps([before, found]))
"""


@pytest.mark.story
def test_in_a_client_the_bound_is_in_the_environment_before_the_first_product(
    tmp_path: Path, tiny_base: Path, settings: LocalSettings
) -> None:
    """The library reads it once, at its first product; the probe's own is the first of a client."""
    flags = {"data": str(write_examples(tmp_path / "examples.jsonl", 0)), "base": str(tiny_base)}
    arguments = [json.dumps(VARIABLES), json.dumps(flags), SPEC.model_dump_json(), TRAINING.model_dump_json()]
    ended = subprocess.run(
        [sys.executable, "-c", FIRST_PRODUCT, *arguments],
        cwd=tmp_path,
        env={
            **{name: value for name, value in os.environ.items() if name not in VARIABLES},
            **QUIET,
            "EDGE_RUNTIME_CACHE": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    before, found = json.loads(ended.stdout.splitlines()[-1])

    assert before == []
    assert found == [dict.fromkeys(VARIABLES, str(PRIMITIVES))]
