"""Personal training by the real trainer: what is trained, what leaves, and what a kill on the way costs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import ways
from edge_runtime.errors import RoundError
from edge_runtime.lora import rebasing
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import cut, decompose, refill, to_pair
from edge_runtime.trainer import AdapterSpec, LocalResult, PersonalSpec, StepReport, Training
from tests.runtime.said import directive
from tests.train.tiny import random_adapter

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

import export  # noqa: E402 - after the check that torch is there
from edge_runtime.train import own_texts  # noqa: E402 - as above
from edge_runtime.train.keeping import FINISHED, Keeping, apart  # noqa: E402 - as above
from edge_runtime.train.local import LocalSettings, LocalTrainer  # noqa: E402 - as above
from edge_runtime.train.near import terms_of  # noqa: E402 - as above
from edge_runtime.train.planning import shared  # noqa: E402 - as above
from edge_runtime.train.receiving import Received  # noqa: E402 - as above
from edge_runtime.train.rows import Example  # noqa: E402 - as above
from export import verify  # noqa: E402 - as above
from export.subject import Subject  # noqa: E402 - as above
from profiles.terms import Overrides  # noqa: E402 - as above
from tests.train.devices import settings_in  # noqa: E402 - as above
from tests.train.test_terms import SCALING, added, assert_equal, dense, pairs  # noqa: E402 - as above

pytestmark = pytest.mark.torch

SPEC = AdapterSpec(
    family="lora", target_modules=("q_proj", "v_proj"), scaling=2.0, max_rank=4, max_held=8, hold_more=True,
    max_length=32,
)  # fmt: skip
OWN = SPEC.model_copy(update={"own": 2})
TRAINING = Training(
    max_steps=6, learning_rate=5e-3, batch_size=2, warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, seed=7
)
PLANNED = Overrides(rank=4, held=8, precision="fp32", micro_batch=1, threads=1, compute_dtype="fp32")


@pytest.fixture(scope="module")
def settings(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalSettings:
    return settings_in(tmp_path_factory.mktemp("device"), tiny_base, PLANNED)


def introduced(settings: LocalSettings, spec: AdapterSpec = SPEC) -> LocalTrainer:
    owner = replace(settings.owner, overrides=replace(PLANNED, rank=4 + spec.own, held=8 + spec.own))
    trainer = LocalTrainer(replace(settings, owner=owner), say=lambda _: None)
    trainer.introduce(spec, TRAINING, None, lambda _: None)
    return trainer


def version(trainer: LocalTrainer, seed: int = 0) -> Adapter:
    """A version in the server's form, with room in it: of half the rank that the device holds."""
    found = random_adapter(trainer.ready.slot, seed, size=0.05)
    halves = {name: to_pair(decompose([(1.0, cut(pair, pair.rank // 2))])) for name, pair in found.items()}
    return Adapter({name: refill(half, found[name].rank, name) for name, half in halves.items()})


def scene_of(name: str, trainer: LocalTrainer, received: Adapter, kept: Adapter) -> tuple[ways.Scene, ways.Start]:
    private = "b" if name == "private_factor" else ""
    spec = OWN if name == "two_level" else SPEC
    asked = directive(version=3, private=private, adapter=spec, training=TRAINING)
    scene = ways.Scene(received, asked, shared(trainer.ready.slot, spec), 3, kept)
    return scene, ways.WAYS[name].begin(scene)


def trained(
    trainer: LocalTrainer, scene: ways.Scene, start: ways.Start, stop_after: int = 99, proximal: float = 0.0
) -> LocalResult:
    steps: list[StepReport] = []
    trainer.receive(start.slices.seen, start.slices.rows)
    asked = ways.training_of(PersonalSpec(proximal=proximal), scene.directive, TRAINING.max_steps, start.factors)
    return trainer.train(asked, 9, steps.append, lambda: len(steps) >= stop_after, start.away)


@pytest.mark.parametrize("name", sorted(ways.WAYS))
def test_each_way_trains_its_own_part_of_a_real_model_and_nothing_else(settings: LocalSettings, name: str) -> None:
    trainer = introduced(settings, OWN if name == "two_level" else SPEC)
    received = version(trainer)
    scene, start = scene_of(name, trainer, received, Adapter({}))
    result = trained(trainer, scene, start)
    assert result.loss_last < result.loss_first
    for layer, pair in trainer.personal().items():
        fleet = received[layer]
        same_a = [i for i in range(fleet.rank) if np.array_equal(pair.a[i], fleet.a[i])]
        same_b = [i for i in range(fleet.rank) if np.array_equal(pair.b[:, i], fleet.b[:, i])]
        everything = list(range(fleet.rank))
        wanted = {
            "finetune": (everything[4:], everything[4:]),
            "private_factor": (everything, everything[4:]),
            "two_level": (everything[:-2], everything[:-2]),
            "beside": (everything, everything),
        }[name]
        assert (same_a, same_b) == wanted, layer
        assert pair.rank == fleet.rank + (3 if name == "beside" else 0)


@pytest.mark.parametrize("name", ways.FREE)
def test_a_kept_part_begins_on_the_next_version_where_it_ended_on_the_last(settings: LocalSettings, name: str) -> None:
    """The whole model, on a version that is the former one in another gauge: the same loss."""
    trainer = introduced(settings)
    received = version(trainer)
    scene, start = scene_of(name, trainer, received, Adapter({}))
    moved = trained(trainer, scene, start).change
    after = trainer.evaluate()
    changed = ways.WAYS[name].changed
    assert changed is not None
    kept = changed(scene, start, moved)
    draw = np.random.default_rng(1)
    turned = {}
    for layer, pair in received.items():
        by = np.linalg.qr(draw.standard_normal((pair.rank, pair.rank)))[0]
        turned[layer] = Pair((by @ pair.a).astype(np.float32), (pair.b @ by.T).astype(np.float32))
    _, start = scene_of(name, trainer, Adapter(turned), kept)
    trainer.receive(start.slices.seen, start.slices.rows)
    assert trainer.evaluate() == pytest.approx(after, rel=1e-5)
    trainer.receive(received)
    assert abs(trainer.evaluate() - after) > 1e-3, "or nothing was learnt"


def test_what_leaves_with_a_pair_beside_computes_what_the_live_model_computes(
    settings: LocalSettings, tmp_path: Path
) -> None:
    trainer = introduced(settings)
    scene, start = scene_of("beside", trainer, version(trainer), Adapter({}))
    trained(trainer, scene, start)
    prompts, prepared = verify.encode(trainer.ready.base.tokenizer), trainer.ready.base.prepared
    known = verify.reference_of(trainer.ready.live, prompts, tmp_path, count=2)
    subject = Subject(trainer.personal(), SPEC.scaling, str(prepared.folder), prepared)
    folder = tmp_path / "peft"
    folder.mkdir()
    export.get("peft").write(subject, folder)
    found = verify.judge(known, export.get("peft").open_engine(subject, folder))
    assert found.distance.max_logit_diff <= 1e-5
    assert found.effect > 1e-2, "an adapter without effect would leave as well"


@pytest.mark.parametrize("name", sorted(ways.WAYS))
def test_a_kill_in_the_middle_ends_in_the_same_bytes(settings: LocalSettings, tmp_path: Path, name: str) -> None:
    kept = replace(settings, keeping=Keeping(tmp_path, 1, 3600.0))
    spec = OWN if name == "two_level" else SPEC
    calm = introduced(settings, spec)
    received, change_before = version(calm), Adapter({})
    if name in ways.FREE:
        change_before = rebasing.apart(version(calm, 5), received).only(list(received)[:1])
    wanted = trained(calm, *scene_of(name, calm, received, change_before), proximal=0.1)
    broken = introduced(kept, spec)
    with pytest.raises(KeyboardInterrupt):
        trained(broken, *scene_of(name, broken, received, change_before), stop_after=3, proximal=0.1)
    again = introduced(kept, spec)
    assert trained(again, *scene_of(name, again, received, change_before), proximal=0.1).change.digest() == (
        wanted.change.digest()
    )
    assert again.personal().digest() == calm.personal().digest()


def test_no_round_of_the_fleet_goes_on_from_personal_training(settings: LocalSettings, tmp_path: Path) -> None:
    """Neither its moments nor its drift are those of a round."""
    keeping = Keeping(tmp_path, 1, 3600.0)
    trainer = introduced(replace(settings, keeping=keeping))
    received = version(trainer)
    trainer.receive(received)
    trainer.train(TRAINING, 1, lambda _: None, lambda: False)
    finished = (tmp_path / FINISHED).read_bytes()
    trained(trainer, *scene_of("finetune", trainer, received, Adapter({})))
    own = apart(keeping)
    assert own is not None
    assert (tmp_path / FINISHED).read_bytes() == finished
    assert (own.folder / FINISHED).exists()
    shutil.rmtree(own.folder)


@pytest.mark.parametrize("seed", range(4))
def test_the_pull_of_a_personal_adapter_is_to_the_global_one(seed: int) -> None:
    """μ/2 ‖P - G‖² of the whole, by autograd, with the part of P that is not trained elsewhere than that of G."""
    start, now, rest, fleet = (pairs(seed + at) for at in (0, 50, 100, 150))
    exact = {name: decompose([(1.0, start[name]), (1.0, rest[name]), (-1.0, fleet[name])]) for name in start}
    away = {name: to_pair(found) for name, found in exact.items()}
    training = TRAINING.model_copy(update={"proximal": 0.7})
    received = Received(start, {}, "")

    def whole(parameters: object) -> None:
        for term in terms_of(training, received, None, SCALING, Adapter(away)):
            term(parameters)  # type: ignore[arg-type]

    def value(products: object) -> object:
        gaps = [
            products[name]  # type: ignore[index]
            + torch.from_numpy((rest[name].product() - fleet[name].product()).astype(np.float64))
            for name in start
        ]
        return 0.35 * sum((gap**2).sum() for gap in gaps)

    assert_equal(added(whole, now), dense(now, value))


def test_texts_that_choose_are_never_reported_and_none_is_trained_on() -> None:
    examples = [Example(text=f"text {number}") for number in range(100)]
    for count, most in ((100, 24), (100, 4), (12, 2), (7, 24), (2, 24)):
        parts = own_texts.parts_of(examples[:count], 0.25, most)
        texts = [{one.text for one in part} for part in parts]
        assert sum(map(len, texts)) == len(set.union(*texts)), "no text is in two parts"
        assert 1 <= len(parts.reported) <= most
        assert len(parts.choosing) <= min(most, len(parts.reported))
    assert own_texts.parts_of(examples, 0.25, 4) == own_texts.parts_of(examples[::-1], 0.25, 4)


def test_a_device_that_holds_out_next_to_nothing_has_none_to_choose_by() -> None:
    examples = [Example(text=f"text {number}") for number in range(8)]
    assert own_texts.parts_of(examples, 0.25, 24).choosing == []


def test_a_trainer_tells_how_many_choose_and_judges_by_them_alone(settings: LocalSettings) -> None:
    trainer = introduced(settings)
    intro = trainer.introduce(SPEC, TRAINING, None, lambda _: None)
    assert intro.choosing == len(trainer.ready.choosing) == 1
    trainer.receive(version(trainer))
    assert trainer.evaluate("choosing") != trainer.evaluate()


def test_a_pair_beside_needs_rows_to_be_named(settings: LocalSettings) -> None:
    """An adapter that is wider than the slot by mistake is still refused."""
    trainer = introduced(settings)
    received = version(trainer)
    _, start = scene_of("beside", trainer, received, Adapter({}))
    with pytest.raises(RoundError, match="at rank 8"):
        trainer.receive(start.slices.seen)
