"""The real trainer on slices of any kind: what it trains, what it gives back, and rounds that are taken up again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.lora import allocation, slices
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.lora.algebra import changed, decompose, take, to_pair
from edge_runtime.trainer import AdapterSpec, LocalResult, Training
from tests.train.tiny import random_adapter

pytest.importorskip("torch")

from edge_runtime.train.keeping import Keeping
from edge_runtime.train.local import LocalSettings, LocalTrainer
from profiles.terms import Overrides
from tests.train.devices import settings_in

pytestmark = pytest.mark.torch

SPEC = AdapterSpec(
    family="lora", target_modules=("q_proj", "v_proj"), scaling=2.0, max_rank=4, max_held=12, hold_more=True,
    max_length=32,
)  # fmt: skip
TRAINING = Training(
    max_steps=6, learning_rate=5e-3, batch_size=2, warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, seed=7
)
PLANNED = Overrides(rank=4, held=12, precision="fp32", micro_batch=1, threads=1, compute_dtype="fp32")


@pytest.fixture(scope="module")
def settings(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalSettings:
    return settings_in(tmp_path_factory.mktemp("device"), tiny_base, PLANNED)


def introduced(settings: LocalSettings, training: Training = TRAINING) -> LocalTrainer:
    trainer = LocalTrainer(settings, say=lambda _: None)
    trainer.introduce(SPEC, training, None, lambda _: None)
    return trainer


def handed_out(trainer: LocalTrainer, seed: int = 0) -> Adapter:
    """A version in the server's form, as far as the device holds it; its layers are of unlike size."""
    found = random_adapter(trainer.ready.slot, seed, size=0.05)
    return Adapter(
        {
            name: to_pair(decompose([(0.3**at, pair)]), 0, pair.rank)
            for at, (name, pair) in enumerate(sorted(found.items()))
        }
    )


def trained(
    trainer: LocalTrainer, training: Training = TRAINING, round_number: int = 1, stop_after: int = 99
) -> LocalResult:
    steps: list[int] = []
    return trainer.train(
        training, round_number, lambda report: steps.append(report.step), lambda: len(steps) >= stop_after
    )


def ranks_of(trainer: LocalTrainer, received: Adapter, name: str) -> dict[str, int]:
    if name == allocation.UNIFORM:
        return trainer.ready.slot.trained
    spectra = {layer: allocation.singular_values(pair) for layer, pair in received.items()}
    return allocation.ranks(trainer.ready.slot, spectra)


@pytest.mark.parametrize("name", sorted(slices.POLICIES))
@pytest.mark.parametrize("shared", allocation.ALLOCATIONS)
def test_a_real_model_trains_the_slice_that_a_policy_chose_and_nothing_else(
    settings: LocalSettings, name: str, shared: str
) -> None:
    trainer = introduced(settings)
    received = handed_out(trainer)
    trainer.receive(received)
    before = trainer.evaluate()
    ranks = ranks_of(trainer, received, shared)
    assert (len(set(ranks.values())) > 1) == (shared == allocation.SPECTRUM)
    scores = trainer.scores() if name in slices.SCORED else None
    found = slices.lay_out(received, slices.choose(name, received, ranks, 2, scores), 2)
    trainer.receive(found.seen, found.rows)
    if name != "fresh":
        assert trainer.evaluate() == pytest.approx(before, rel=1e-5), "the same model, cut in another way"
    result = trained(trainer)
    personal = trainer.personal()

    assert result.change.ranks == ranks
    assert result.loss_last < result.loss_first
    for layer, pair in found.seen.items():
        rows = found.rows.get(layer, ())
        rest = [row for row in range(pair.rank) if row not in rows]
        assert np.array_equal(take(personal[layer], rest).b, take(pair, rest).b)
        if rows:
            moved = changed(found.before[layer], result.change[layer])
            np.testing.assert_allclose(take(personal[layer], rows).b, moved.b, atol=1e-6)
            assert np.abs(result.change[layer].b).max() > 1e-4
    trainer.receive(received)
    assert trainer.personal().digest() == received.digest(), "and back to the plan's own slice"


def test_a_round_of_another_slice_is_another_round(settings: LocalSettings, tmp_path: Path) -> None:
    """A state on disk is of a slice: it is not taken up for another one of the same ranks."""
    kept = replace(settings, keeping=Keeping(tmp_path, 1, 3600.0))
    trainer = introduced(kept)
    received = handed_out(trainer)
    rows = {name: tuple(range(4, 8)) for name in received}
    trainer.receive(received, rows)
    with pytest.raises(KeyboardInterrupt):
        trained(trainer, stop_after=3)
    again = introduced(kept)
    again.receive(received)
    other = trained(again).change.digest()
    fresh = introduced(settings)
    fresh.receive(received)

    assert trained(fresh).change.digest() == other


@pytest.mark.parametrize("way", ["proximal", "correction", "both"])
def test_a_round_with_terms_ends_in_the_same_bytes_however_it_was_interrupted(
    settings: LocalSettings, tmp_path: Path, way: str
) -> None:
    """Two rounds; the second one is corrected by the first, stopped in its middle, and taken up in another process."""
    asked = {"proximal": 0.5 * (way != "correction"), "correction": 1.0 * (way != "proximal")}
    training = TRAINING.model_copy(update=asked)
    digests, unlike = [], []
    for name in ("memory", "disk", "restarted", "asked twice"):
        chosen = settings if name == "memory" else replace(settings, keeping=Keeping(tmp_path / name, 2, 3600.0))
        trainer = introduced(chosen, training)
        received = handed_out(trainer)
        trainer.receive(received)
        trained(trainer, training)
        version = Adapter(
            {
                layer: to_pair(decompose([(0.5, pair), (0.5, trainer.personal()[layer])]), 0, pair.rank)
                for layer, pair in received.items()
            }
        )
        trainer.receive(version)
        if name == "restarted":
            with pytest.raises(KeyboardInterrupt):
                trained(trainer, training, 2, stop_after=3)
            trainer = introduced(chosen, training)
            trainer.receive(version)
        result = trained(trainer, training, 2)
        if name == "asked twice":  # killed after its round and before its update was safe
            trainer = introduced(chosen, training)
            trainer.receive(version)
            assert trained(trainer, training, 2).change.digest() == result.change.digest()
        digests.append(result.change.digest())
        plain = introduced(settings)
        plain.receive(version)
        unlike.append(trained(plain, TRAINING, 2).change.digest())

    assert len(set(digests)) == 1
    assert set(digests).isdisjoint(unlike), "the terms have an effect"


def test_a_pull_keeps_the_product_nearer_to_what_was_received(settings: LocalSettings) -> None:
    def far(strength: float) -> float:
        trainer = introduced(settings)
        received = handed_out(trainer)
        trainer.receive(received)
        trained(trainer, TRAINING.model_copy(update={"proximal": strength, "max_steps": 12}))
        found: dict[str, Pair] = dict(trainer.personal())
        return float(sum(np.linalg.norm(found[name].product() - pair.product()) for name, pair in received.items()))

    free = far(0.0)
    assert far(100.0) < 0.7 * free
