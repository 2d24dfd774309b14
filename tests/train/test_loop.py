"""A local round: deterministic, resumable, exact however memory cuts it, and never silently without effect."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from edge_runtime.config import Training  # noqa: E402 - after the check that torch is there
from edge_runtime.errors import DataError, RoundError  # noqa: E402 - after the check that torch is there
from edge_runtime.lora.algebra import take  # noqa: E402 - as above
from edge_runtime.schedule import SCHEDULES  # noqa: E402 - as above
from edge_runtime.train.data import IGNORED, Tokenised  # noqa: E402 - as above
from edge_runtime.train.evaluating import evaluate  # noqa: E402 - as above
from edge_runtime.train.live import (  # noqa: E402 - as above
    LiveModel,
    attach,
    load_adapter,
    read_all,
    trainable_parameters,
    without_adapter,
)
from edge_runtime.train.loop import (  # noqa: E402 - as above
    LocalTask,
    TrainResult,
    learning_rate_at,
    train_round,
)
from edge_runtime.train.optimizer import OPTIMIZERS  # noqa: E402 - as above
from edge_runtime.train.resume import RoundState, StepReport  # noqa: E402 - as above
from tests.train import tiny  # noqa: E402 - as above

pytestmark = pytest.mark.torch

EXAMPLES = tiny.examples(10)
TASK = LocalTask(steps=6, learning_rate=1e-2, micro_batch=2, gradient_accumulation_steps=2, warmup_steps=1, seed=7)


@pytest.fixture(scope="module")
def shared(tiny_base: Path) -> LiveModel:
    return attach(tiny.plain_model(tiny_base), tiny.MIXED, scaling=2.0)


@pytest.fixture
def live(shared: LiveModel) -> LiveModel:
    """A live model that holds the same adapter at the beginning of each test."""
    load_adapter(shared, tiny.random_adapter(tiny.MIXED))
    return shared


def trained_digest(live: LiveModel, task: LocalTask = TASK, **settings: Any) -> str:
    load_adapter(live, tiny.random_adapter(tiny.MIXED))
    train_round(live, EXAMPLES, task, **settings)
    return read_all(live).digest()


def first_step(live: LiveModel, task: LocalTask) -> StepReport:
    load_adapter(live, tiny.random_adapter(tiny.MIXED))
    return train_round(live, EXAMPLES, dataclasses.replace(task, steps=1)).state.reports[0]


def stop_after(count: int) -> Callable[[], bool]:
    """Says stop when it has been asked `count` times before."""
    asked = Counter[str]()

    def should_stop() -> bool:
        asked["times"] += 1
        return asked["times"] > count

    return should_stop


@pytest.mark.parametrize("build", [tiny.plain_model, tiny.nf4_model])
def test_training_lowers_the_loss(tiny_base: Path, build: Callable[[Path], Any]) -> None:
    live = attach(build(tiny_base), tiny.MIXED, scaling=2.0)
    load_adapter(live, tiny.random_adapter(tiny.MIXED, size=0.1))
    before = evaluate(live, EXAMPLES).loss
    result = train_round(live, EXAMPLES, dataclasses.replace(TASK, steps=20))

    assert evaluate(live, EXAMPLES).loss < 0.9 * before
    assert result.loss_last < 0.9 * result.loss_first


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_ones(live: LiveModel) -> None:
    first = trained_digest(live)

    assert trained_digest(live) == first
    assert trained_digest(live, dataclasses.replace(TASK, seed=8)) != first


def test_the_global_random_state_neither_matters_nor_changes(live: LiveModel) -> None:
    torch.manual_seed(1)
    first = trained_digest(live)
    torch.manual_seed(2)
    state = torch.get_rng_state()

    assert trained_digest(live) == first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("count", [0, 1, 5, 6, 11])
def test_a_round_that_was_stopped_anywhere_and_resumed_ends_in_the_same_bytes(
    live: LiveModel, tiny_base: Path, count: int, optimizer: str
) -> None:
    """In another process too: everything comes from the state, nothing from the interrupted model."""
    task = dataclasses.replace(TASK, optimizer=optimizer, lora_plus_ratio=4.0)
    expected = trained_digest(live, task)
    load_adapter(live, tiny.random_adapter(tiny.MIXED))
    stopped = train_round(live, EXAMPLES, task, should_stop=stop_after(count))
    other = attach(tiny.plain_model(tiny_base), tiny.MIXED, scaling=2.0)
    load_adapter(other, tiny.random_adapter(tiny.MIXED))
    resumed = train_round(other, EXAMPLES, task, start=stopped.state)

    assert (stopped.finished, stopped.steps) == (False, count // 2)
    assert (resumed.finished, resumed.steps) == (True, 6)
    assert read_all(other).digest() == expected


def test_a_state_of_another_slot_is_refused(live: LiveModel, tiny_base: Path) -> None:
    state = train_round(live, EXAMPLES, TASK).state
    other = attach(tiny.plain_model(tiny_base), tiny.slot_of({tiny.layer(1, "q_proj"): (6, 2)}), scaling=2.0)

    with pytest.raises(RoundError, match="other parameters"):
        train_round(other, EXAMPLES, TASK, start=state)


@pytest.mark.parametrize(("micro_batch", "accumulated"), [(1, 4), (4, 1)])
def test_the_micro_batch_changes_memory_not_the_step(live: LiveModel, micro_batch: int, accumulated: int) -> None:
    """Examples have unequal lengths: a mean of means would differ."""
    expected = first_step(live, TASK)
    task = dataclasses.replace(TASK, micro_batch=micro_batch, gradient_accumulation_steps=accumulated)
    found = first_step(live, task)

    assert found.tokens == expected.tokens
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-4)


def test_checkpointing_changes_memory_not_the_step(live: LiveModel) -> None:
    plain = first_step(live, TASK)
    recomputed = first_step(live, dataclasses.replace(TASK, gradient_checkpointing=True))

    assert recomputed.loss == pytest.approx(plain.loss, rel=1e-6)
    assert recomputed.gradient_norm == pytest.approx(plain.gradient_norm, rel=1e-5)


@pytest.mark.parametrize("recomputed", [0, 1, 2, None])
def test_how_many_layers_are_recomputed_does_not_change_a_byte(live: LiveModel, recomputed: int | None) -> None:
    task = dataclasses.replace(TASK, gradient_checkpointing=True, recomputed_layers=recomputed)

    assert trained_digest(live, task) == trained_digest(live)


def test_checkpointing_recomputes_no_layer_below_the_first_trained_one(live: LiveModel) -> None:
    """Layer 0 is only held, layers 1 and 2 are trained."""
    runs: Counter[int] = Counter()
    layers = live.model.model.layers
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: runs.update([index]))
        for index, layer in enumerate(layers)
    ]
    task = dataclasses.replace(TASK, steps=1, gradient_accumulation_steps=1, gradient_checkpointing=True)
    train_round(live, EXAMPLES, task)
    for hook in hooks:
        hook.remove()

    assert runs == {0: 1, 1: 2, 2: 2}


def test_only_the_trained_slice_moves(live: LiveModel) -> None:
    before = tiny.random_adapter(tiny.MIXED)
    directions = {tiny.layer(1, "q_proj"): (5, 1, 3, 0)}
    load_adapter(live, before, directions)
    train_round(live, EXAMPLES, TASK)
    after = read_all(live)
    for name, found in tiny.MIXED.layers.items():
        if found.held:
            trained = live.directions.get(name, ())
            held = [row for row in range(found.held) if row not in trained]

            assert (take(after[name], held).product() == take(before[name], held).product()).all()
            for row in trained:
                assert (take(after[name], [row]).product() != take(before[name], [row]).product()).any()


def test_training_after_an_evaluation_still_has_gradients_on_4_bit_weights(tiny_base: Path) -> None:
    """On CPUs with bfloat16 instructions bitsandbytes packs weights in evaluation, and then loses their gradients."""
    live = attach(tiny.nf4_model(tiny_base), tiny.MIXED, scaling=2.0)
    load_adapter(live, tiny.random_adapter(tiny.MIXED))
    direct = train_round(live, EXAMPLES, TASK)
    load_adapter(live, tiny.random_adapter(tiny.MIXED))
    evaluate(live, EXAMPLES)
    later = train_round(live, EXAMPLES, TASK)

    assert later.state.reports == direct.state.reports


def test_a_parameter_without_a_gradient_is_an_error_not_a_round_without_effect(tiny_base: Path) -> None:
    live = attach(tiny.plain_model(tiny_base), tiny.MIXED, scaling=2.0)
    layers = live.model.model.layers
    layers[2].register_forward_hook(lambda _module, _inputs, output: output.detach().requires_grad_(True))

    with pytest.raises(RoundError, match="expected a gradient for each of 8 parameters"):
        train_round(live, EXAMPLES, TASK)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error_that_says_what_to_do(live: LiveModel, broken: float) -> None:
    with torch.no_grad():
        next(iter(trainable_parameters(live).values())).fill_(broken)

    with pytest.raises(RoundError, match=r"step 1.*learning_rate"):
        train_round(live, EXAMPLES, TASK)


def test_no_example_no_completion_and_no_trained_layer_are_errors(live: LiveModel, tiny_base: Path) -> None:
    silent = (Tokenised((3, 4, 5), (IGNORED, IGNORED, IGNORED)),)
    with pytest.raises(DataError, match="at least one example"):
        train_round(live, (), TASK)
    with pytest.raises(DataError, match="completion tokens"):
        train_round(live, silent, TASK)
    with pytest.raises(DataError, match="completion tokens"):
        evaluate(live, silent)
    holder = attach(tiny.plain_model(tiny_base), tiny.slot_of({tiny.layer(1, "q_proj"): (2, 0)}), scaling=1.0)
    with pytest.raises(RoundError, match="trains no layer"):
        train_round(holder, EXAMPLES, TASK)


def test_the_evaluation_weighs_tokens_not_batches_and_restores_the_mode(live: LiveModel) -> None:
    found = [evaluate(live, EXAMPLES, batch=batch) for batch in (1, 3, 10)]
    alone = [evaluate(live, [example]) for example in EXAMPLES]
    expected = sum(one.loss * one.tokens for one in alone) / sum(one.tokens for one in alone)
    live.model.train()
    evaluate(live, EXAMPLES)

    assert [one.loss for one in found] == pytest.approx([expected] * 3, rel=1e-5)
    assert {one.tokens for one in found} == {sum(example.learned for example in EXAMPLES)}
    assert live.model.training


def test_the_base_model_alone_can_be_evaluated(live: LiveModel) -> None:
    with_adapter = evaluate(live, EXAMPLES).loss
    with without_adapter(live):
        alone = evaluate(live, EXAMPLES).loss

    assert alone != pytest.approx(with_adapter, rel=1e-3)
    assert evaluate(live, EXAMPLES).loss == with_adapter


def test_a_round_leaves_the_model_as_it_found_it_but_for_the_slice(live: LiveModel) -> None:
    live.model.eval()
    train_round(live, EXAMPLES, dataclasses.replace(TASK, gradient_checkpointing=True))

    assert not live.model.training
    assert not live.model.is_gradient_checkpointing
    assert all(parameter.grad is None for parameter in live.model.parameters())


def test_the_result_counts_different_examples_and_all_tokens(live: LiveModel) -> None:
    seen: list[StepReport] = []
    short: TrainResult = train_round(live, EXAMPLES, dataclasses.replace(TASK, steps=2), on_step=seen.append)
    long = train_round(live, EXAMPLES, dataclasses.replace(TASK, steps=5))

    assert (short.examples, long.examples) == (8, 10)
    assert long.tokens == 2 * sum(example.learned for example in EXAMPLES)
    assert [report.step for report in seen] == [1, 2]
    assert tuple(seen) == short.state.reports
    assert (short.loss_first, short.loss_last) == (seen[0].loss, seen[1].loss)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_the_learning_rate_rises_once_then_never_rises_and_is_never_zero(schedule: str) -> None:
    task = LocalTask(steps=10, learning_rate=0.5, warmup_steps=3, schedule=schedule)
    rates = [learning_rate_at(task, step) for step in range(10)]

    assert rates[:4] == sorted(rates[:4])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[3] == max(rates) == 0.5
    assert min(rates) > 0


def test_the_configuration_knows_every_schedule_by_name() -> None:
    assert set(get_args(Training.model_fields["schedule"].annotation)) == set(SCHEDULES)


def test_each_step_offers_its_state_before_it_is_reported(live: LiveModel) -> None:
    """Whoever has heard of a step may rely on its having been kept."""
    seen: list[str] = []
    states: list[RoundState] = []

    def keep(state: Callable[[], RoundState]) -> None:
        seen.append("kept")
        states.append(state())

    train_round(live, EXAMPLES, TASK, keep=keep, on_step=lambda _: seen.append("reported"))

    assert seen == ["kept", "reported"] * 6
    assert [len(state.reports) for state in states] == [state.position for state in states] == [1, 2, 3, 4, 5, 6]


def test_moments_of_an_earlier_round_change_the_next_one(live: LiveModel) -> None:
    """A state without steps: all of the round is done, by an optimiser that remembers."""
    load_adapter(live, tiny.random_adapter(tiny.MIXED))
    parameters = {name: p.detach().numpy().copy() for name, p in trainable_parameters(live).items()}
    earlier = train_round(live, EXAMPLES, TASK).state
    load_adapter(live, tiny.random_adapter(tiny.MIXED))
    result = train_round(live, EXAMPLES, TASK, start=RoundState((), parameters, earlier.moments, 0))

    assert result.steps == TASK.steps
    assert read_all(live).digest() != trained_digest(live)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"learning_rate": 0.0},
        {"micro_batch": 0},
        {"schedule": "lineer"},
        {"max_grad_norm": -1.0},
        {"optimizer": "adam"},
        {"lora_plus_ratio": 0.5},
        {"recomputed_layers": -1},
    ],
)
def test_a_task_that_cannot_be_done_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(TASK, **wrong)


@pytest.mark.parametrize(("factors", "still"), [("a", "b"), ("b", "a")])
def test_a_round_of_one_factor_leaves_the_other_as_it_was(live: LiveModel, factors: Any, still: str) -> None:
    """In its first step the factor that is trained goes the way that it goes when both are."""
    load_adapter(live, tiny.random_adapter(tiny.MIXED))
    before = read_all(live)
    result = train_round(live, EXAMPLES, dataclasses.replace(TASK, factors=factors))
    after = read_all(live)
    rows = {name: list(found) for name, found in live.directions.items()}

    assert all(name.endswith(f".{factors}") for name in result.state.parameters)
    for name, pair in after.items():
        assert np.array_equal(getattr(pair, still), getattr(before[name], still))
        if name in rows:
            moved = getattr(pair, factors) - getattr(before[name], factors)
            assert np.abs(moved[rows[name]] if factors == "a" else moved[:, rows[name]]).max() > 0
    load_adapter(live, tiny.random_adapter(tiny.MIXED))
    both = train_round(live, EXAMPLES, TASK)
    assert {name for name in both.state.parameters if name.endswith(".a")}, "and the next round trains both again"
    alone, together = (first_step(live, dataclasses.replace(TASK, factors=which)) for which in (factors, "ab"))
    assert alone.loss == together.loss
    assert 0 < alone.gradient_norm < together.gradient_norm


def test_a_round_of_one_factor_that_was_interrupted_ends_in_the_same_bytes(live: LiveModel) -> None:
    task = dataclasses.replace(TASK, factors="b")
    expected = trained_digest(live, task)
    load_adapter(live, tiny.random_adapter(tiny.MIXED))
    stopped = train_round(live, EXAMPLES, task, should_stop=stop_after(5))
    load_adapter(live, tiny.random_adapter(tiny.MIXED))
    train_round(live, EXAMPLES, task, start=stopped.state)

    assert read_all(live).digest() == expected
