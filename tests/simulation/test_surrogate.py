from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import RoundError
from edge_runtime.lora.adapter import Adapter, Pair
from edge_runtime.trainer import AdapterSpec, Introduction, Training
from server.aggregators.method import fresh_state
from simulation.settings import Surrogate
from simulation.surrogate import Problem, SurrogateTrainer

SPEC = AdapterSpec(
    family="lora", target_modules=("q_proj",), scaling=2.0, max_rank=8, max_held=8, hold_more=True, max_length=8
)
TRAINING = Training(
    max_steps=300, learning_rate=0.02, batch_size=8, warmup_steps=2, weight_decay=0.0, max_grad_norm=1.0, seed=0
)


def trainer(problem: Problem, rank: int, examples: list[int], name: str = "a") -> SurrogateTrainer:
    slot = problem.slot(rank, 8, 1.0)
    intro = Introduction(slot=slot, base="b", examples=sum(examples), device="d", precision="p", plan="p", software="s")
    made = SurrogateTrainer(problem, intro, SPEC, name, examples)
    made.receive(fresh_state(slot.shapes, 8, 0).adapter)
    return made


@given(st.integers(0, 99), st.integers(1, 5), st.floats(0, 2))
def test_the_loss_is_the_mean_over_classes_and_the_floor_its_minimum(seed: int, classes: int, apart: float) -> None:
    problem = Problem(Surrogate(layers=2, width=6, rank=2, heterogeneity=apart), classes, seed)
    draw = np.random.default_rng(seed)
    shares = draw.dirichlet(np.ones(classes))
    whole = draw.standard_normal((2, 6, 6))
    naive = sum(
        share * np.mean([np.sum((whole[layer] - target[layer]) ** 2) / 2 for layer in range(2)])
        for share, target in zip(shares, problem.targets, strict=True)
    )
    assert problem.loss(whole, shares) == pytest.approx(naive)
    best = problem.mean(shares)
    assert problem.loss(best, shares) == pytest.approx(problem.floor(shares), abs=1e-9)
    assert problem.loss(best + 0.1 * whole, shares) > problem.floor(shares)


def test_classes_are_as_far_apart_as_was_set() -> None:
    problem = Problem(Surrogate(layers=3, width=10, rank=4, heterogeneity=0.5), 4, 0)
    alike = Problem(Surrogate(layers=3, width=10, rank=4, heterogeneity=0.0), 4, 0)
    assert np.allclose(np.linalg.norm(problem.targets - alike.targets, axis=(2, 3)), 0.5)
    assert alike.floor(np.full(4, 0.25)) == pytest.approx(0.0, abs=1e-12)
    assert max(np.linalg.matrix_rank(layer) for layer in alike.targets[0]) == 4


def test_a_device_of_enough_rank_learns_its_own_mixture_and_one_of_less_does_not() -> None:
    problem = Problem(Surrogate(layers=2, width=12, rank=2, heterogeneity=0.0, noise=0.0), 3, 0)
    losses = {}
    for rank in (1, 2):
        device = trainer(problem, rank, [4, 4, 4])
        result = device.train(TRAINING, 1, lambda _: None, lambda: False)
        losses[rank] = device.evaluate()
        assert result.loss_first == pytest.approx(0.5)
    assert losses[2] < 0.01 < losses[1]


def test_training_is_a_function_of_device_round_and_seed() -> None:
    problem = Problem(Surrogate(layers=2, width=6, rank=2), 3, 0)
    few = TRAINING.model_copy(update={"max_steps": 5})

    def trained(name: str = "a", number: int = 1) -> str:
        device = trainer(problem, 2, [4, 4, 4], name)
        return device.train(few, number, lambda _: None, lambda: False).change.digest()

    assert trained() == trained()
    assert len({trained(), trained("b"), trained(number=2)}) == 3


@pytest.mark.parametrize("factors", ["a", "b"])
def test_a_factor_that_is_not_trained_stays(factors: str) -> None:
    problem = Problem(Surrogate(layers=2, width=6, rank=2), 3, 0)
    device = trainer(problem, 2, [4, 4, 4])
    asked = TRAINING.model_copy(update={"max_steps": 5, "factors": factors})
    before = device.evaluate()
    for pair in device.train(asked, 1, lambda _: None, lambda: False).change.values():
        assert not (pair.b if factors == "a" else pair.a).any()
    # At b = 0, `a` alone changes nothing.
    assert (device.evaluate() < before) == (factors == "b")


def test_a_step_follows_the_gradient_of_the_loss() -> None:
    """Against finite differences, by the sign of Adam's first step."""
    problem = Problem(Surrogate(layers=1, width=4, rank=2, noise=0.0), 1, 0)
    device = trainer(problem, 2, [4])
    name = problem.names[0]
    draw = np.random.default_rng(0)
    start = Adapter({name: Pair(*(draw.standard_normal(size).astype(np.float32) for size in ((8, 4), (4, 8))))})
    device.receive(start)
    one = TRAINING.model_copy(update={"max_steps": 1, "warmup_steps": 0, "learning_rate": 1e-4})
    moved = device.train(one, 1, lambda _: None, lambda: False).change[name]
    for row, column in ((0, 0), (1, 3)):
        bumped = start[name].a.copy()
        bumped[row, column] += 1e-2
        up = problem.loss(problem.dense(Adapter({name: Pair(bumped, start[name].b)})), np.ones(1))
        here = problem.loss(problem.dense(start), np.ones(1))
        assert np.sign(up - here) == -np.sign(moved.a[row, column])


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_a_loss_that_is_not_finite_is_an_error_that_names_the_device() -> None:
    problem = Problem(Surrogate(layers=1, width=4, rank=2), 1, 0)
    device = trainer(problem, 2, [4])
    with pytest.raises(RoundError, match="'a': the loss of step"):
        device.train(TRAINING.model_copy(update={"learning_rate": 1e200}), 1, lambda _: None, lambda: False)
